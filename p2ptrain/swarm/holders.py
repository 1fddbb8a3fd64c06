"""Who on this machine has what we want, a port or a lock: for the sentence that says so.

Only what the kernel shows this user is seen: other users' processes may stay unnamed, and locks are named on
Linux only. Then the answer is `another program`, and the sentence is still true.
"""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

UNKNOWN = "another program"
LOCKS = Path("/proc/locks")


def port_holder(port: int) -> str:
    """Who listens on this TCP port, in words."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return _named(connection.pid)
    except (psutil.Error, OSError):
        pass
    return UNKNOWN


def lock_holder(path: Path) -> str:
    """Who has this file locked (`flock`), in words."""
    try:
        inode = str(path.stat().st_ino)
        for line in LOCKS.read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 4711 08:01:123456 0 EOF; who waits for a lock has an arrow.
            match line.split():
                case [_, "FLOCK", _, _, pid, file, *_] if file.rpartition(":")[2] == inode:
                    return _named(int(pid))
    except (OSError, ValueError):
        pass
    return UNKNOWN


def _named(pid: int) -> str:
    """A libp2p daemon is nobody's own doing: named is who started it."""
    try:
        process = psutil.Process(pid)
        if process.name() == "p2pd" and (parent := process.parent()) is not None:
            process = parent
        return f"process {process.pid} ({process.name()})"
    except psutil.Error:
        return f"process {pid}"
