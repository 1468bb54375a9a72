"""What passes through to a real Synapse, beside asking it directly: time, and memory."""

import itertools
import json
import os
import time
from collections.abc import Callable
from statistics import median

import httpx

from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import PeerError, Server, running
from flowbridge.cli.demo.synapse import LocalSynapse

SYNC = "/_matrix/client/v3/sync"
UPLOAD = "/_matrix/media/v3/upload"
UPLOAD_MB = 20
SYNCS = 200
UPLOADS = 9
MESSAGES = 100
ABOUT = f"""\
A real Synapse, one caller, in turns with and without flowbridge in between: {SYNCS} syncs with `timeout=0` of an
account with {MESSAGES} messages in a room, each with another filter, since Synapse remembers its answers; and
{UPLOADS} uploads of {UPLOAD_MB} MB. Memory is flowbridge's, from before the first to after the last."""

Ask = Callable[[httpx.Client], httpx.Response]


def relay(run: Run) -> Section:
    """Pass-through of `/sync` and of an upload: memory, and time beside a direct request."""
    with LocalSynapse() as homeserver, running(flowbridge_command(homeserver.url), run.directory) as bridge:
        headers = {"Authorization": f"Bearer {homeserver.register('bench').access_token}"}
        with (
            httpx.Client(base_url=homeserver.url, headers=headers, trust_env=False, timeout=60) as direct,
            httpx.Client(base_url=bridge.url, headers=headers, trust_env=False, timeout=60) as through,
        ):
            _fill_a_room(direct)
            body = os.urandom(UPLOAD_MB * 1_000_000)
            rows, targets = [], []
            for name, ask, times in (("/sync", _sync(), SYNCS), (f"{UPLOAD_MB} MB upload", _upload(body), UPLOADS)):
                row, found = _measure(name, ask, times, bridge, direct, through)
                rows.append(row)
                targets += found
    return Section(
        title="Pass-through",
        about=ABOUT,
        header=["what", "direct ms", "through flowbridge ms", "ratio", "memory grew by MB"],
        rows=rows,
        targets=targets,
    )


def _measure(
    name: str, ask: Ask, times: int, bridge: Server, direct: httpx.Client, through: httpx.Client
) -> tuple[list[str], list[Target]]:
    for client in (direct, through):  # what is made at the first is there from then on
        _seconds(ask, client)
    before = bridge.rss_mb()
    pairs = [(_seconds(ask, direct), _seconds(ask, through)) for _ in range(times)]
    grown = bridge.rss_mb() - before
    alone, passed = (median(column) * 1000 for column in zip(*pairs, strict=True))
    say(f"  {name}: {alone:.1f} ms directly, {passed:.1f} ms through flowbridge, memory {grown:+.1f} MB")
    row = [name, f"{alone:.1f}", f"{passed:.1f}", f"{passed / alone:.2f}", f"{grown:.1f}"]
    return row, [
        Target(f"{name}: time of a direct one's", passed / alone, 1.3),
        Target(f"{name}: memory", grown, 5, " MB"),
    ]


def _seconds(ask: Ask, client: httpx.Client) -> float:
    began = time.perf_counter()
    answer = ask(client)
    seconds = time.perf_counter() - began
    if answer.status_code != 200:
        raise PeerError(f"{answer.request.method} {answer.request.url} answers {answer.status_code}")
    return seconds


def _sync() -> Ask:
    numbers = itertools.count()

    def ask(client: httpx.Client) -> httpx.Response:
        only = {"room": {"timeline": {"limit": 50, "not_types": [f"none.{next(numbers)}"]}}}
        return client.get(SYNC, params={"timeout": 0, "filter": json.dumps(only)})

    return ask


def _upload(body: bytes) -> Ask:
    return lambda client: client.post(UPLOAD, content=body, headers={"Content-Type": "application/octet-stream"})


def _fill_a_room(client: httpx.Client) -> None:
    room = client.post("/_matrix/client/v3/createRoom", json={}).raise_for_status().json()["room_id"]
    for number in range(MESSAGES):
        path = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/{number}"
        client.put(path, json={"msgtype": "m.text", "body": f"message {number}"}).raise_for_status()
