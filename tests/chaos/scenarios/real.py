"""The same against a real Synapse."""

import asyncio
import json
import shutil
import signal
import statistics
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from urllib.parse import quote

from tests.chaos.client import Client, NoAnswer
from tests.chaos.homeserver import Homeserver, bearer
from tests.chaos.judge import read_lines
from tests.chaos.load import ANSWER_SECONDS, Load
from tests.chaos.options import Options
from tests.chaos.real import synapse as real_synapse
from tests.chaos.report import Report
from tests.chaos.scenarios.scenario import for_seconds, until
from tests.chaos.stage import Stage, stage, temporary_directory
from tests.processes import free_port

DRAIN_ROOMS = 20
ROUNDS = 3
ARRIVAL_SECONDS = 300.0


async def synapse(options: Options) -> Report:
    """One bridge in front of a real Synapse is killed every few seconds; its rooms are read as a member does."""
    few = {name: min(getattr(options, name), 2) for name in ("fire", "states", "matrix")}
    options = replace(options, rooms=min(options.rooms, 8), **few)
    rooms = options.rooms + sum(few.values())
    async with _real(rooms) as (homeserver, _), stage(options, homeserver=homeserver) as it:
        async with it.loading():
            await for_seconds(options.seconds, it.monkey.kill_every(options.every, at_work=True))
        return await it.report("synapse", await it.drain())


async def drain(options: Options) -> Report:
    """2,000 events queued while a real Synapse could not be reached, against direct senders to as many rooms."""
    async with _real(DRAIN_ROOMS, every=2.0) as (homeserver, directory):
        address = directory / "address"
        _point(address, homeserver.urls[0])
        plain = replace(options, rooms=DRAIN_ROOMS, fire=0, states=0, matrix=0).with_settings(
            BASE_URL=f"file://{address}"
        )
        async with stage(plain, homeserver=homeserver) as it:
            with it.accepted_log.open("ab", buffering=0) as log:
                load = it.load = Load(it.plan, log)
                await _introduce(it)
                direct, bridged = [], []
                for number in range(ROUNDS):
                    direct.append(await _rate(it, f"direct-{number}", _direct))
                    bridged.append(await _rate(it, f"bridge-{number}", _Queue(load, address, number * options.events)))
            rates = " ".join(f"{one:.0f}/{other:.0f}" for one, other in zip(bridged, direct, strict=True))
            ratio = statistics.median(bridged) / statistics.median(direct)
            what = f"drained, of the rate of direct senders: {ratio:.2f}, wanted ≥ 0.9 (events/s: {rates})"
            it.check("ratio", what, ratio >= 0.9, f"{ratio:.2f} of direct senders' rate")
            return await it.report("drain", await it.drain())


@asynccontextmanager
async def _real(rooms: int, *, every: float = 0.5) -> AsyncIterator[tuple[Homeserver, Path]]:
    """With a directory for its timelines, which stays behind when the run fails."""
    directory = temporary_directory()
    async with real_synapse(directory, rooms, every=every) as homeserver:
        yield homeserver, directory
    shutil.rmtree(directory, ignore_errors=True)


async def _rate(it: Stage, mark: str, send: Callable[[Stage, str], Coroutine[None, None, None]]) -> float:
    """Events a second from the first to the last, by the homeserver's clock."""
    await send(it, mark)

    async def arrived() -> bool:
        return len(_times(it, mark)) >= DRAIN_ROOMS * it.options.events

    if not await until(arrived, ARRIVAL_SECONDS, every=1.0):
        raise NoAnswer(f"not all events of {mark} arrived within {ARRIVAL_SECONDS:g} s")
    times = _times(it, mark)
    return (len(times) - 1) / (max(times) - min(times))


def _times(it: Stage, mark: str) -> list[float]:
    return [line["at"] for line in read_lines(it.homeserver.log) if line["mark"] == mark]


def _content(mark: str, n: int | None) -> bytes:
    return json.dumps({"msgtype": "m.text", "body": f"{mark} {n}", "n": n, "mark": mark}).encode()


async def _direct(it: Stage, mark: str) -> None:
    """One sender to each room; not for the judge."""

    async def send(room: str) -> None:
        client = Client(it.homeserver.urls[0])
        path = f"/_matrix/client/v3/rooms/{quote(room, safe='')}/send/m.room.message"
        for _ in range(it.options.events):
            target = f"{path}/{token_hex(8)}"
            answer = await client.ask("PUT", target, _content(mark, None), bearer(it.homeserver.bot), seconds=60)
            if answer.status != 200:
                raise NoAnswer(f"Synapse answers {answer.status}")
        client.close()

    async with asyncio.TaskGroup() as group:
        for room in it.plan.room_ids():
            group.create_task(send(room))


async def _introduce(it: Stage) -> None:
    """Whose token it is must be known before the homeserver is away."""
    client = Client(it.bridge.url)
    target = f"/rooms/{quote(it.plan.room_ids()[0], safe='')}/send/m.room.message"
    answer = await client.ask("POST", target, _content("first", None), it.plan.headers[0], seconds=ANSWER_SECONDS)
    client.close()
    if answer.status != 200:
        raise NoAnswer(f"the bridge answers {answer.status} {answer.body[:200].decode(errors='replace')}")


class _Queue:
    """Fills the bridge's queue while it cannot reach the homeserver, then lets it go."""

    def __init__(self, load: Load, address: Path, first: int) -> None:
        self._load = load
        self._address = address
        self._first = first

    async def __call__(self, it: Stage, mark: str) -> None:
        await self._move(it, f"http://127.0.0.1:{free_port()}", ready=False)
        async with asyncio.TaskGroup() as group:
            for room in it.plan.room_ids():
                group.create_task(self._send(it, room, mark))
        await self._move(it, it.homeserver.urls[0], ready=True)

    async def _send(self, it: Stage, room: str, mark: str) -> None:
        client = Client(it.bridge.url)
        headers = {**it.plan.headers[0], "Prefer": "respond-async", "Content-Type": "application/json"}
        target = f"/rooms/{quote(room, safe='')}/send/m.room.message"
        for n in range(self._first, self._first + it.options.events):
            answer = await client.ask("POST", target, _content(mark, n), headers, seconds=ANSWER_SECONDS)
            if answer.status != 202:
                raise NoAnswer(f"the bridge answers {answer.status} {answer.body[:200].decode(errors='replace')}")
            self._load.accept(room, n, answer, 0.0)
        client.close()

    async def _move(self, it: Stage, url: str, *, ready: bool) -> None:
        """Point the bridge at another address, and wait until it reports that it is ready there, or not."""
        _point(self._address, url)
        it.bridge.process.send(signal.SIGHUP)
        client = Client(it.bridge.url)

        async def moved() -> bool:
            return ((await client.ask("GET", "/readyz")).status == 200) is ready

        if not await until(moved, ANSWER_SECONDS, every=0.1):
            raise NoAnswer(f"the bridge does not follow to {url}")
        client.close()


def _point(address: Path, url: str) -> None:
    address.write_text(url)
