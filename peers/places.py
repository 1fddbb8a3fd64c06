"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from p2ptrain.errors import StorageError

if TYPE_CHECKING:  # commands that answer at once come here, too
    from p2ptrain.config import PeerConfig


def user_data() -> Path:
    """p2ptrain's folder in the user's data (XDG base directories)."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "p2ptrain"


def data_folder(config: PeerConfig, run_id: str) -> Path:
    """The folder of one peer's key, checkpoints and journal, made if it is not there."""
    return made(Path(config.data_dir).expanduser() if config.data_dir else user_data() / run_id)


def made(folder: Path) -> Path:
    """The folder, which can be written. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the data folder {folder} cannot be made: {error.strerror}; "
            "choose another data_dir in the peer file"
        ) from error
    return folder
