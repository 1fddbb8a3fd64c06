"""The pieces of a snapshot that a joiner has, on disk, so that a download outlives its process.

One snapshot at a time: `partial/STATE_DIGEST/` holds `manifest.json` and a file per piece. Nothing here is
believed: whoever reads a piece back checks it against the manifest, and the manifest against the donors'.
A disk that is full or cannot be written makes a download that cannot be resumed, and nothing else.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from p2ptrain.records import Manifest

FOLDER = re.compile(r"[0-9a-f]{64}")
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**20


class Partial:
    """What is there of a snapshot in `folder`; None for keeping nothing. Nothing raises for want of disk."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._place: Path | None = None
        """Where the pieces of the present download go; None for nowhere."""

    def manifest(self) -> Manifest | None:
        """Of the download that was begun, if one was and it can be read."""
        for place in self._places():
            try:
                with (place / MANIFEST).open("rb") as file:
                    manifest = Manifest.model_validate_json(file.read(MAX_MANIFEST_BYTES))
            except (OSError, ValidationError):
                continue
            if manifest.state_digest == place.name:
                return manifest
        return None

    def begin(self, manifest: Manifest) -> None:
        """Keep pieces of this snapshot from now on; those of any other are deleted."""
        if self._folder is None:
            return
        place = self._folder / manifest.state_digest
        if self.manifest() != manifest:
            self.clear()
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / MANIFEST).write_text(manifest.model_dump_json())
        except OSError:
            self.clear()
        else:
            self._place = place

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each piece that is here, as they were found: a torn one among them, perhaps."""
        for path in self._place.glob("*.piece") if self._place is not None else ():
            try:
                yield int(path.stem), path.read_bytes()
            except (OSError, ValueError):
                continue

    def keep(self, number: int, data: bytes) -> None:
        """Write a piece. Once that fails, what is here makes room: no more pieces of this one are kept."""
        if self._place is None:
            return
        try:
            (self._place / f"{number}.piece").write_bytes(data)
        except OSError:
            self.clear()

    def clear(self) -> None:
        """Delete all there is: the download is over, or its snapshot is."""
        self._place = None
        for place in self._places():
            shutil.rmtree(place, ignore_errors=True)

    def _places(self) -> list[Path]:
        if self._folder is None:
            return []
        try:
            return [each for each in self._folder.iterdir() if FOLDER.fullmatch(each.name)]
        except OSError:
            return []
