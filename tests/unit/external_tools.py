"""Programs that some tests run. One that is missing is a failure with its remedy, never a skip."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def run_tool(
    program: str, *arguments: str, debian_package: str, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end and return its status and what it printed."""
    path = shutil.which(program)
    if path is None:
        pytest.fail(f"this test needs {program}; install it with: apt-get install {debian_package}")
    return subprocess.run(
        [path, *arguments], input=stdin, env=env, capture_output=True, text=True, timeout=60, check=False
    )
