"""Live events: how long one event takes to reach 500 listeners, beside a client's own long poll."""

import asyncio
import json
import time
from statistics import median
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx

from benchmarks.load import metric
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import HOST, PeerError, Server, running

if TYPE_CHECKING:
    from flowbridge.cli.demo.synapse import LocalSynapse

LISTENERS = 500
WARM_UP = 5
EVENTS = 50
PATIENCE = 30.0  # seconds
LIMIT_MS = 200
ABOUT = f"""\
{LISTENERS} listeners to `GET /live` with one token, real Synapse on SQLite. {EVENTS} messages are sent to Synapse
itself, one after another; the time of each counts from the start of that request until a client of Synapse has it from
its own `/sync` (direct), and until the last of the listeners has it."""
API = "/_matrix/client/v3"


class Listener(asyncio.Protocol):
    """Reads a stream, and notes when the message that is looked for has come."""

    def __init__(self, audience: "Audience") -> None:
        self._audience = audience
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        if self._audience.wanted in data:
            self._tail = b""
            self._audience.heard()
        else:
            self._tail = data[-64:]


class Audience:
    """All listeners. `wanted`: what they wait for."""

    def __init__(self) -> None:
        self._left = 0
        self._all = asyncio.Event()
        self.wanted = b""

    def expect(self, wanted: bytes) -> None:
        self.wanted, self._left = wanted, LISTENERS
        self._all.clear()

    def heard(self) -> None:
        self._left -= 1
        if not self._left:
            self._all.set()

    async def last(self) -> float:
        """When the last of them had it."""
        async with asyncio.timeout(PATIENCE):
            await self._all.wait()
        return time.perf_counter()


def live(run: Run) -> Section:
    """The last of 500 listeners against a direct long poll, and what the bridge needs for them."""
    from flowbridge.cli.demo.synapse import LocalSynapse

    say("  starting Synapse")
    with (
        LocalSynapse(rate_limits=False) as homeserver,
        running(flowbridge_command(homeserver.url), run.directory) as bridge,
    ):
        direct, last, polls = asyncio.run(_measure(homeserver, bridge))
        rss = bridge.rss_mb()
    reached = max(last) - median(direct)
    return Section(
        title="Live",
        about=ABOUT,
        header=["way", "median ms", "slowest ms", "RSS MB", "long polls upstream"],
        rows=[
            ["direct", f"{median(direct):.1f}", f"{max(direct):.1f}", "-", "1"],
            [f"last of {LISTENERS}", f"{median(last):.1f}", f"{max(last):.1f}", f"{rss:.1f}", f"{polls:g}"],
        ],
        targets=[
            Target(f"the slowest event with all of {LISTENERS}, after the median direct one", reached, LIMIT_MS, " ms"),
            Target(f"memory with {LISTENERS} listeners", rss, 200, " MB"),
            Target("long polls for one account", polls, 1),
        ],
    )


async def _measure(homeserver: "LocalSynapse", bridge: Server) -> tuple[list[float], list[float], float]:
    """Milliseconds of each event: direct, and to the last listener; and how many long polls the bridge holds."""
    account = homeserver.register("bench")
    headers = {"Authorization": f"Bearer {account.access_token}"}
    timeout = httpx.Timeout(PATIENCE + 10)
    async with httpx.AsyncClient(base_url=homeserver.url, headers=headers, trust_env=False, timeout=timeout) as client:
        room = str((await client.post(f"{API}/createRoom", json={})).raise_for_status().json()["room_id"])
        audience = Audience()
        transports = await _open(bridge, account.access_token, audience)
        polls = metric(bridge.url, "flowbridge_live_accounts")
        say(f"  {len(transports)} listeners, {WARM_UP} + {EVENTS} events")
        since = (await client.get(f"{API}/sync", params={"timeout": 0})).json()["next_batch"]
        direct, last = [], []
        for number in range(WARM_UP + EVENTS):
            marker = f"event-{number}-of-the-benchmark"
            audience.expect(marker.encode())
            polling = asyncio.create_task(_poll(client, since, marker))
            await asyncio.sleep(0.1)  # until both long polls wait
            began = time.perf_counter()
            path = f"{API}/rooms/{quote(room, safe='')}/send/m.room.message/{number}"
            sending = asyncio.create_task(client.put(path, json={"msgtype": "m.text", "body": marker}))
            (seen, since), heard, _ = await asyncio.gather(polling, audience.last(), sending)
            direct.append((seen - began) * 1e3)
            last.append((heard - began) * 1e3)
        for transport in transports:
            transport.abort()
    return direct[WARM_UP:], last[WARM_UP:], polls


async def _open(bridge: Server, token: str, audience: Audience) -> list[asyncio.Transport]:
    """All listeners, once each has the first bytes of its stream."""
    audience.expect(b"\nid: ")
    request = f"GET /live HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    transports = []
    for _ in range(LISTENERS):
        transport, _ = await loop.create_connection(lambda: Listener(audience), HOST, bridge.port)
        transport.write(request)
        transports.append(transport)
    await audience.last()
    return transports


async def _poll(client: httpx.AsyncClient, since: str, marker: str) -> tuple[float, str]:
    """When a client of the homeserver itself has the message, and where it continues."""
    ends = time.perf_counter() + PATIENCE
    while time.perf_counter() < ends:
        answer = await client.get(f"{API}/sync", params={"timeout": 30_000, "since": since})
        seen = time.perf_counter()
        since = answer.json()["next_batch"]
        if marker in json.dumps(answer.json()):
            return seen, since
    raise PeerError("a message sent to Synapse does not come back in its /sync")
