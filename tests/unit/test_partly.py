"""Parts of a package are imported without the rest of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from p2ptrain.swarm.partly import parts_only


def test_part_is_imported_without_what_its_package_would_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "heavy"
    package.mkdir()
    (package / "__init__.py").write_text("from heavy.part import TOLD\nWHOLE = True\n")
    (package / "part.py").write_text("from heavy.more import TOLD\n")
    (package / "more.py").write_text("TOLD = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with parts_only("heavy"):
        from heavy.part import TOLD  # type: ignore[import-not-found]

        assert not hasattr(sys.modules["heavy"], "WHOLE")
    import heavy  # type: ignore[import-not-found]

    assert heavy.WHOLE
    assert heavy.TOLD is TOLD  # no part is there twice
    with parts_only("heavy"):
        assert sys.modules["heavy"] is heavy
    for name in [name for name in sys.modules if name.partition(".")[0] == "heavy"]:
        del sys.modules[name]


def test_package_that_is_not_installed_is_missed_where_it_is_imported() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), parts_only("no_such_package"):
        import no_such_package.part  # type: ignore[import-not-found]  # noqa: F401
