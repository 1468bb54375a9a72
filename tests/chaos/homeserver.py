"""The homeserver of a run: where the bridges find it, its callers, and the log of its events."""

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.client import Client
from tests.chaos.monkey import Bridge, BridgeBroken
from tests.processes import Process, free_port

API_KEY = "fb_chaos_key-of-32-characters-and-some-more"
BY_KEY = {"X-API-Key": API_KEY}
BOT, ALICE = "syt_bot", "syt_alice"
NO_DEVICE = "syt_carol_nodevice"  # as an application service's: the room does not show its transaction ids


@dataclass(frozen=True)
class Homeserver:
    """`urls`: one for each bridge, so that it can tell them apart. `log`: a line of JSON for each event.

    `bot`: the bridge's own token. `callers`: headers of the senders. `rooms`: only these exist; none: any.
    """

    urls: tuple[str, ...]
    log: Path
    bot: str
    callers: tuple[dict[str, str], ...]
    rooms: tuple[str, ...] = ()
    scripted: bool = True

    async def steer(self, command: str, **faults: Any) -> dict[str, Any]:
        """A command to the scripted one: `stats`, `faults`, `forget`, `down?seconds=N`. Raises NoAnswer while down."""
        client = Client(self.urls[0])
        try:
            method = "GET" if command == "stats" else "POST"
            return (await client.ask(method, f"/_judge/{command}", json.dumps(faults).encode(), seconds=5)).json()
        finally:
            client.close()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def scripted(directory: Path, faults: Mapping[str, float], *, ports: int, seed: int) -> AsyncIterator[Homeserver]:
    """The faulty homeserver; `faults`: its options. Raises BridgeBroken when it does not start."""
    numbers = [free_port() for _ in range(ports)]
    urls = tuple(f"http://127.0.0.1:{number}" for number in numbers)
    log = directory / "homeserver.events"
    argv = [sys.executable, "-m", "tests.chaos.faulty_homeserver", "--seed", str(seed), "--log", str(log)]
    argv += ["--port", *map(str, numbers)]
    argv += [word for name, value in faults.items() for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    process = Process("homeserver", argv, {}, directory)
    process.start()
    try:
        if not await Bridge(process, urls[0], "/_judge/stats").ready(once=True):
            raise BridgeBroken(f"the homeserver does not start: {process.last_words()}")
        yield Homeserver(urls, log, BOT, (BY_KEY, bearer(ALICE), bearer(NO_DEVICE)))
    finally:
        process.kill()
