"""Who is measured: each peer is one worker process that answers the same kind of call."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import nginx
from benchmarks.load import SEND_PATH, TOKEN
from benchmarks.servers import HOST, REPOSITORY, Command, PeerError, Server, free_port

HERE = Path(__file__).parent
# What our own environment must not hold; made by `uv pip compile --universal --generate-hashes`.
WEBHOOK_LOCK = HERE / "matrix-webhook.lock"
SNIFFIO_LOCK = HERE / "sniffio.lock"
LOCKS = [WEBHOOK_LOCK, SNIFFIO_LOCK]
BIN = Path(sys.executable).parent
BEFORE_STORE = "4676f4f"  # the last commit without an outbox


@dataclass(frozen=True)
class Peer:
    """A peer and the path of its call; a guarded one must refuse invalid messages and missing tokens."""

    command: Command
    path: str = SEND_PATH
    guarded: bool = False


def nginx_proxy(upstream: Server, directory: Path) -> Peer:
    """nginx as a reverse proxy: the limit."""
    return Peer(nginx.proxy(upstream, directory))


def handwritten(upstream: Server, directory: Path) -> Peer:
    """FastAPI, stock httpx and jsonschema, served by uvicorn as it comes."""
    return Peer(_handwritten("handwritten", upstream, {}), guarded=True)


def handwritten_with_sniffio(upstream: Server, directory: Path) -> Peer:
    """The same with sniffio, which httpx no longer brings along.

    httpcore 1.0.9 (`_synchronization.py`) imports it on every call, and Python does not cache that it failed.
    """
    site_packages = next((environment(SNIFFIO_LOCK) / "lib").glob("python*/site-packages"))
    command = _handwritten("handwritten+sniffio", upstream, {"PYTHONPATH": str(site_packages)})
    return Peer(command, guarded=True)


def _handwritten(name: str, upstream: Server, settings: dict[str, str]) -> Command:
    port = free_port()
    argv = [str(BIN / "uvicorn"), "--app-dir", str(REPOSITORY), "benchmarks.handwritten:app"]
    argv += ["--host", HOST, "--port", str(port)]
    return Command(name, argv, port, "/openapi.json", {"BASE_URL": upstream.url, **settings})


def matrix_webhook(upstream: Server, directory: Path) -> Peer:
    """matrix-webhook; its caller shows a key in the query, and it joins the room before every message."""
    port = free_port()
    argv = [
        str(environment(WEBHOOK_LOCK) / "bin" / "python"),
        "-m",
        "matrix_webhook",
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    settings = {
        "MATRIX_URL": upstream.url,
        "MATRIX_ID": "@bench:example.org",
        "MATRIX_TOKEN": TOKEN,
        "API_KEY": "bench",
    }
    command = Command("matrix-webhook", argv, port, "/health", settings)
    return Peer(command, path="/?key=bench&room_id=%21room%3Aexample.org")


def flowbridge(upstream: Server, directory: Path) -> Peer:
    """The bridge itself; the sender shows its own token."""
    return Peer(flowbridge_command(upstream.url), guarded=True)


def without_store(upstream: Server, directory: Path) -> Peer:
    """The bridge as it was before the outbox, from this repository's history."""
    home = directory / "without-store"
    home.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", BEFORE_STORE, "flowbridge", "schemas"],
        check=False,
        capture_output=True,
    )
    if archive.returncode:
        raise PeerError(f"commit {BEFORE_STORE} is not in this clone: {archive.stderr.decode().strip()[:160]}")
    subprocess.run(["tar", "-x", "-C", str(home)], input=archive.stdout, check=True)
    port = free_port()
    argv = [sys.executable, "-m", "flowbridge", "serve", "--host", HOST, "--port", str(port)]
    settings = {"BASE_URL": upstream.url, "PYTHONPATH": str(home)}
    return Peer(Command("without store", argv, port, "/healthz", settings), guarded=True)


def flowbridge_command(homeserver_url: str) -> Command:
    """`flowbridge serve` in front of a homeserver, everything else at its default."""
    port = free_port()
    argv = [str(BIN / "flowbridge"), "serve", "--host", HOST, "--port", str(port)]
    return Command("flowbridge", argv, port, "/healthz", {"BASE_URL": homeserver_url})


PEERS: dict[str, Callable[[Server, Path], Peer]] = {
    "nginx": nginx_proxy,
    "handwritten": handwritten,
    "handwritten+sniffio": handwritten_with_sniffio,
    "matrix-webhook": matrix_webhook,
    "without store": without_store,
    "flowbridge": flowbridge,
}
# Those that come from outside: a machine without a package index can still measure the others.
INSTALLED = {"handwritten+sniffio", "matrix-webhook", "without store"}


def pinned(lock: Path) -> str:
    """`name==version` of the package that a lock file is named for."""
    words = lock.read_text().split()
    return next(word for word in words if word.startswith(f"{lock.stem}=="))


def environment(lock: Path) -> Path:
    """A cached virtual environment with what a lock file pins, made on first use."""
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowbridge-bench"
    home = cache / f"{lock.stem}-python{sys.version_info.major}.{sys.version_info.minor}-{digest}"
    if not (home / "complete").exists():
        _install(lock, home)
    return home


def _install(lock: Path, home: Path) -> None:
    print(f"  installing {pinned(lock)} into an environment of its own", flush=True)
    # Without pip, and filled by ours: Debian's bare python3 has no ensurepip.
    make = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)]
    fill = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "-q"]
    fill += ["--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
    for command in (make, fill):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise PeerError(f"could not be installed: {lines[-1][:160]}")
    (home / "complete").touch()
