"""`flowbridge serve` under systemd's `Type=notify`: what the manager is told on its socket."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import processes
from tests.patience import PATIENCE
from tests.upstream import Upstream


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """A socket as systemd binds it; its path has to be short."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(Path(folder) / "notify"))
        bound.settimeout(PATIENCE)
        yield bound


def test_manager_hears_of_start_life_and_stop(manager: socket.socket, tmp_path: Path) -> None:
    told: dict[str, Any] = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "100000"}
    with Upstream() as upstream, processes.serving(cwd=tmp_path, BASE_URL=upstream.url, **told) as (url, process):
        assert manager.recv(4_096).decode() == f"READY=1\nSTATUS=Serving on {url}"
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        assert [manager.recv(4_096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        os.kill(process.pid, signal.SIGTERM)
        while (heard := manager.recv(4_096)) == b"WATCHDOG=1":
            pass
        assert heard.startswith(b"STOPPING=1\n")
        assert process.wait(PATIENCE) == 0


def test_life_is_not_told_for_another_process(manager: socket.socket, tmp_path: Path) -> None:
    told: dict[str, Any] = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    with Upstream() as upstream, processes.serving(cwd=tmp_path, BASE_URL=upstream.url, **told) as (_, process):
        assert manager.recv(4_096).startswith(b"READY=1\n")
        os.kill(process.pid, signal.SIGTERM)
        assert manager.recv(4_096).startswith(b"STOPPING=1\n")


def test_manager_that_is_gone_is_no_trouble(tmp_path: Path) -> None:
    told: dict[str, Any] = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "100000"}
    with Upstream() as upstream, processes.serving(cwd=tmp_path, BASE_URL=upstream.url, **told) as (url, process):
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
