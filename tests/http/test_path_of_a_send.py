"""How much of the code one send passes through, which is what its reader has to follow.

In a warm bridge a profiler notes every function of flowbridge that is called on the event loop, from the first byte of
the request to the last step after the commit. Resuming a coroutine is not a call. The store is locked until the caller
has the answer: the commit always comes last, so the order of the calls does not depend on the disk.
"""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest

import flowbridge
from tests.http.conftest import HELLO, SEND, new_token, post, running
from tests.patience import PATIENCE
from tests.upstream import Upstream

MOST_MODULES = 43
MOST_SWITCHES = 140
SENDS = 11  # the median counts: a timer may fire during one of them
ROUNDS = 10  # of the event loop, within which everything is over that was not waiting for something else

PACKAGE = Path(flowbridge.__file__).parent
TIMERS = (
    "web/server",
    "web/file_limit",
    "web/service_manager",
)  # run ten times a second, whether anything is sent or not

Call = tuple[str, str]  # module, function


class Recorder:
    """A profiler that notes the calls on the event loop of a thread which starts while it is installed."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._on = False
        self._called = threading.Event()
        self._frames: set[FrameType] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self._on or event != "call" or frame in self._frames:  # in it: a coroutine is resumed
            return
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE):
            return
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # a thread of the store
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if module not in TIMERS:
            self._frames.add(frame)
            self.calls.append((module, frame.f_code.co_qualname))
            self._called.set()

    def start(self) -> None:
        self.calls = []
        self._on = True

    def stop(self) -> None:
        self._on = False
        self._frames.clear()

    def wait_for_another(self) -> None:
        assert self._called.wait(PATIENCE), "nothing more is called"

    def settle(self) -> None:
        """Until what has begun on the event loop is over."""
        assert self._loop is not None, "nothing was called"
        for _ in range(ROUNDS):
            over = threading.Event()
            self._loop.call_soon_threadsafe(over.set)
            assert over.wait(PATIENCE)
        self._called.clear()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    threading.setprofile(found)
    yield found
    threading.setprofile(None)


@pytest.fixture
def sends(recorder: Recorder, upstream: Upstream, tmp_path: Path) -> list[list[Call]]:
    """The calls of some sends by one caller into one room, after as many that nobody counted."""
    found: list[list[Call]] = []
    request = post(SEND, json.dumps(HELLO).encode(), f"Authorization: Bearer {new_token()}")  # in one piece
    with (
        running(upstream, tmp_path) as bridge,
        bridge.connect() as caller,
        closing(sqlite3.connect(tmp_path / "flowbridge.db", isolation_level=None)) as store,
    ):
        for _ in range(SENDS):
            assert caller.send(request).answer().status == 200
        for _ in range(SENDS):
            store.execute("BEGIN IMMEDIATE")
            recorder.start()
            assert caller.send(request).answer().status == 200
            recorder.settle()
            store.execute("ROLLBACK")
            recorder.wait_for_another()
            recorder.settle()
            recorder.stop()
            found.append(recorder.calls)
    return found


def modules(calls: list[Call]) -> list[str]:
    """The modules in the order in which they are entered; one that calls itself is entered once."""
    names = [module for module, _ in calls]
    return names[:1] + [name for before, name in pairwise(names) if name != before]


def test_send_passes_through_few_modules_and_seldom_goes_from_one_to_another(sends: list[list[Call]]) -> None:
    calls = sorted(sends, key=lambda one: len(modules(one)))[SENDS // 2]
    entered, switches = set(modules(calls)), len(modules(calls)) - 1
    shown = "\n".join(f"{module}: {function}" for module, function in calls)
    assert len(entered) <= MOST_MODULES, f"{sorted(entered)}\n{shown}"
    assert switches <= MOST_SWITCHES, f"{switches}\n{shown}"
