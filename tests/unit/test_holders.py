"""Who has a port or a lock is named; who cannot be seen is called another program. One machine, one user."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from p2ptrain.swarm import holders
from p2ptrain.swarm.holders import UNKNOWN, lock_holder, port_holder


def test_process_is_named_that_listens_on_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert f"process {os.getpid()} (" in port_holder(listener.getsockname()[1])


def test_nobody_is_named_when_nobody_listens_on_a_port() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert port_holder(bound.getsockname()[1]) == UNKNOWN


def test_process_is_named_that_has_a_file_locked(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"")
    assert lock_holder(path) == UNKNOWN
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"process {os.getpid()} (" in lock_holder(path)
    assert lock_holder(path) == UNKNOWN


def test_nobody_is_named_where_the_kernel_lists_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "LOCKS", tmp_path / "none")
    assert lock_holder(tmp_path) == UNKNOWN
