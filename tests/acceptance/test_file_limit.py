"""The limit of open files: raised at the start, and never met by callers' connections alone."""

import json
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flowbridge.web import file_limit
from tests import processes
from tests.http.conftest import HELLO, KEY, SEND, RawClient, post
from tests.upstream import PATIENCE, Upstream

FILES = 256
IN_FLIGHT = (
    b"POST /validate/m.room.message HTTP/1.1\r\nHost: bridge\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
)


@pytest.fixture
def few_files() -> Iterator[None]:
    """Of the processes that are started now, the soft and the hard limit; ours stays high enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2_048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2_048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def bound_to(command: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """`flowbridge` is started by a shell that first says this."""
    starter = folder / "flowbridge"
    starter.write_text(f'#!/bin/sh\n{command}\nexec {processes.FLOWBRIDGE} "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr(processes, "FLOWBRIDGE", str(starter))


def limits_of(pid: int) -> tuple[str, str]:
    found = re.search(r"Max open files +(\S+) +(\S+)", Path(f"/proc/{pid}/limits").read_text())
    assert found
    return found[1], found[2]


def test_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bound_to("ulimit -Sn 200", monkeypatch, tmp_path)
    with Upstream() as upstream, processes.serving_installed(cwd=tmp_path, BASE_URL=upstream.url) as (_, process):
        soft, hard = limits_of(process.pid)
    assert soft == hard != "200"


@pytest.mark.usefixtures("few_files")
def test_callers_who_take_all_files_are_refused_and_the_others_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Others were hung up on without a word, the homeserver could not be connected to, and nothing was logged."""
    bound_to(f"ulimit -n {FILES}", monkeypatch, tmp_path)
    log = tmp_path / "log"
    settings = {"ACCESS_TOKEN": "bot", "FLOWBRIDGE_API_KEYS": KEY}
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        url, _ = stack.enter_context(
            processes.serving_installed(log=log, cwd=tmp_path, BASE_URL=upstream.url, **settings)
        )
        hogs = []
        while True:
            hog = stack.enter_context(RawClient(url))
            hog.try_to_send(IN_FLIGHT)
            status = hog.read_until(b"\r\n\r\n").split(b" ")[1]
            if status == b"503":
                break
            assert status == b"100"
            hogs.append(hog)
        assert len(hogs) > FILES / 2
        hogs[0].__exit__()
        request = post(SEND, json.dumps(HELLO).encode(), f"X-API-Key: {KEY}", "Authorization: Basic x")
        ending = time.monotonic() + PATIENCE  # for the bridge to see that there is a place again
        while (answer := stack.enter_context(RawClient(url)).send(request).answer()).status == 503:
            assert time.monotonic() < ending, answer
        assert answer.status == 200
    lines = [line for line in log.read_text().splitlines() if "connections_refused" in line]
    assert any("bound=files" in line for line in lines)
    assert len(lines) < 5
    assert any("file_limit_low" in line for line in log.read_text().splitlines())


def test_limit_that_others_have_reached_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    watch = file_limit.Watch()
    watch.check()
    assert caplog.records == []
    with ExitStack() as stack:
        lowest = stack.enter_context(socket.socket()).fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
        try:
            watch.check()
            watch.check()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (record,) = caplog.records
    assert (record.msg, record.levelname) == ("file_limit_reached", "ERROR")


def test_limit_is_what_is_needed_where_the_system_gives_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS says that the most is "unlimited", and refuses that."""
    asked: list[tuple[int, int]] = []

    def refuse(_: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        if limits[0] != file_limit.WANTED:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    file_limit.raise_limit()
    assert asked == [(resource.RLIM_INFINITY, resource.RLIM_INFINITY), (file_limit.WANTED, resource.RLIM_INFINITY)]
