"""The command `p2ptrain` as a child that dies with its parent: `python -m peers.offspring PARENT_PID VERB …`.

The kernel sees to it, on Linux, so that it holds even when the parent is killed with -9.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            return
    from peers import cli

    cli.main()


if __name__ == "__main__":
    main()
