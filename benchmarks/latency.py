"""What the bridge adds to one sender's wait: straight to real Synapse and through flowbridge, alternated."""

import http.client
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from statistics import median, quantiles
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from benchmarks.load import MESSAGE
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import PeerError, Server, running

if TYPE_CHECKING:
    from flowbridge.cli.demo.synapse import LocalSynapse

WARM_UP_PAIRS = 30
PAIRS = 300
ABOUT = f"""\
Real Synapse on SQLite, one sender, one keep-alive connection each way, {PAIRS} pairs of one message sent
directly and one through flowbridge, in random order within the pair. The ratio is that of the medians."""


class Sender:
    """One keep-alive connection and one way to send; every answer must hold an event id."""

    def __init__(self, url: str, method: str, path: str, token: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        self._method = method
        self._path = path
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._numbers = count()

    def send(self) -> float:
        """Milliseconds until the answer is read; `{txn}` in the path is a new number each time."""
        path = self._path.replace("{txn}", f"bench{next(self._numbers)}")
        began = time.perf_counter()
        answer = self.call(self._method, path, MESSAGE)
        elapsed = (time.perf_counter() - began) * 1e3
        if "event_id" not in answer:
            raise PeerError(f"{self._method} {path} was answered {answer}")
        return elapsed

    def call(self, method: str, path: str, body: str) -> dict[str, str]:
        """The JSON of one answer."""
        self._connection.request(method, path, body, self._headers)
        answer: dict[str, str] = json.loads(self._connection.getresponse().read())
        return answer

    def close(self) -> None:
        self._connection.close()


def latency(run: Run) -> Section:
    """Medians of both ways and their ratio."""
    # Synapse is an extra: without it, the other benchmarks still run.
    from flowbridge.cli.demo.synapse import LocalSynapse

    say("  starting Synapse")
    with (
        LocalSynapse(rate_limits=False) as homeserver,
        running(flowbridge_command(homeserver.url), run.directory) as bridge,
        _senders(homeserver, bridge) as (direct, bridged),
    ):
        say(f"  {WARM_UP_PAIRS} + {PAIRS} pairs")
        _pairs(direct, bridged, WARM_UP_PAIRS)
        times = _pairs(direct, bridged, PAIRS)
    ratio = median(times[bridged]) / median(times[direct])
    return Section(
        title="Latency",
        about=ABOUT,
        header=["way", "median ms", "p90 ms", "ratio"],
        rows=[
            ["direct", *_figures(times[direct]), "1"],
            ["through flowbridge", *_figures(times[bridged]), f"{ratio:.3f}"],
        ],
        targets=[Target("latency against sending to Synapse directly", ratio, 1.2)],
    )


@contextmanager
def _senders(homeserver: "LocalSynapse", bridge: Server) -> Iterator[tuple[Sender, Sender]]:
    token = homeserver.register("bench").access_token
    room = quote(_create_room(homeserver.url, token), safe="")
    put = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/{{txn}}"
    direct = Sender(homeserver.url, "PUT", put, token)
    bridged = Sender(bridge.url, "POST", f"/rooms/{room}/send/m.room.message", token)
    try:
        yield direct, bridged
    finally:
        direct.close()
        bridged.close()


def _create_room(url: str, token: str) -> str:
    owner = Sender(url, "POST", "", token)
    try:
        return owner.call("POST", "/_matrix/client/v3/createRoom", "{}")["room_id"]
    finally:
        owner.close()


def _pairs(direct: Sender, bridged: Sender, pairs: int) -> dict[Sender, list[float]]:
    times: dict[Sender, list[float]] = {direct: [], bridged: []}
    for _ in range(pairs):
        for sender in random.sample([direct, bridged], 2):
            times[sender].append(sender.send())
    return times


def _figures(milliseconds: list[float]) -> list[str]:
    return [f"{median(milliseconds):.2f}", f"{quantiles(milliseconds, n=10)[-1]:.2f}"]
