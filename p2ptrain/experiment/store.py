"""The folder of an experiment: `grid.json`, what was compared, and `results.jsonl`, a line for each trial
that has ended. A line is handed to the operating system as it is written; one that was torn is trained again.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from p2ptrain.errors import StorageError
from p2ptrain.experiment.grid import Grid
from p2ptrain.experiment.trials import Result

GRID, RESULTS = "grid.json", "results.jsonl"
MAX_BYTES = 64 * 2**20
"""Of either file; a line takes half a kilobyte."""

_RESULT = TypeAdapter(Result)


class Store:
    """Results on disk. `results` are those there are, by their keys."""

    def __init__(self, folder: Path, results: dict[str, Result]) -> None:
        self.folder, self.results = folder, results

    def add(self, result: Result) -> None:
        """Raises StorageError."""
        line = _RESULT.dump_json(result) + b"\n"
        try:
            with (self.folder / RESULTS).open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise _cannot("write", self.folder / RESULTS, error) from None
        self.results[result.key] = result


def open_store(folder: Path, grid: Grid, *, resume: bool) -> Store:
    """The folder to write this grid's results to, which is made if it is not there.

    Raises StorageError if it cannot be written, or holds results already and is not to be gone on with.
    """
    path = folder / RESULTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results: dict[str, Result] = {}
        if path.exists() and path.stat().st_size:
            if not resume:
                raise StorageError(
                    f"{folder} holds results already; go on with them by --resume, or choose another --out"
                )
            results, whole_bytes = _read(path)
            with path.open("r+b") as file:
                file.truncate(whole_bytes)
        (folder / GRID).write_text(grid.model_dump_json(indent=1) + "\n")
        path.touch()
    except OSError as error:
        raise _cannot("write", folder, error) from None
    return Store(folder, results)


def read_store(folder: Path) -> tuple[Grid, dict[str, Result]]:
    """What was compared there, and the results so far. Raises StorageError if there are none."""
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}; name the one that `experiment run` has written")
    missing = [name for name in (GRID, RESULTS) if not (folder / name).is_file()]
    if missing:
        raise StorageError(
            f"{folder} has no {missing[0]}, so no experiment was run there; name the folder that "
            "`experiment run` has written"
        )
    try:
        grid = Grid.model_validate_json(_content(folder / GRID))
        results, _ = _read(folder / RESULTS)
    except ValidationError:
        raise StorageError(
            f"{folder / GRID} is damaged; run the experiment again with --resume, which writes it anew"
        ) from None
    except OSError as error:
        raise _cannot("read", folder, error) from None
    if not results:
        raise StorageError(f"{folder} holds no result yet; let `experiment run` go on with --resume")
    return grid, results


def _read(path: Path) -> tuple[dict[str, Result], int]:
    """By their keys, and how many bytes of the file are whole lines: the last one may be torn."""
    content = _content(path)
    whole_bytes = content.rfind(b"\n") + 1
    results = {}
    for number, line in enumerate(content[:whole_bytes].splitlines(), 1):
        try:
            result = _RESULT.validate_json(line)
        except ValidationError:
            raise StorageError(
                f"line {number} of {path} is no result of this version; delete that line, and --resume has "
                "its cell trained again"
            ) from None
        results[result.key] = result
    return results, whole_bytes


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise StorageError(f"{path} is larger than {MAX_BYTES // 2**20} MB, so no experiment has written it")
    return content


def _cannot(what: str, path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot {what} {path}: {error.strerror or error}")
