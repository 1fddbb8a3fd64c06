"""What is imported for good is left alone by the garbage collector."""

from __future__ import annotations

import gc

import pytest

from peers.lasting import lasting_imports


def test_collector_never_looks_at_what_was_made_in_the_block_and_goes_on_after_it() -> None:
    before = gc.get_freeze_count()
    try:
        with lasting_imports():
            assert not gc.isenabled()
            made: list[list[int]] = [[] for _ in range(100)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
    finally:
        gc.unfreeze()


def test_collector_goes_on_when_an_import_fails() -> None:
    with pytest.raises(ImportError), lasting_imports():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
    gc.unfreeze()
