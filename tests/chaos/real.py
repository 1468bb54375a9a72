"""A real Synapse as the homeserver of a run: accounts, rooms, and their timelines read into a log as they grow."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowbridge.cli.demo.synapse import Account, LocalSynapse, SynapseError
from tests.chaos.client import Client, NoAnswer
from tests.chaos.homeserver import BY_KEY, Homeserver, bearer
from tests.chaos.options import CannotRun

# All of a room's new events each time: what one page left out would be taken for lost.
PAGE = 100_000
NOTHING: dict[str, Any] = {"types": []}
FILTER = {
    "presence": NOTHING,
    "account_data": NOTHING,
    "room": {"timeline": {"limit": PAGE}, "state": NOTHING, "ephemeral": NOTHING, "account_data": NOTHING},
}


@asynccontextmanager
async def synapse(directory: Path, rooms: int, *, every: float = 0.5) -> AsyncIterator[Homeserver]:
    """One with a bot, a friend and this many rooms that both are in; read every `every` seconds. Raises CannotRun."""
    server = LocalSynapse(rate_limits=False, config={"filter_timeline_limit": PAGE})
    try:
        await asyncio.to_thread(server.__enter__)
    except SynapseError as error:
        raise CannotRun(str(error)) from None
    try:
        bot, friend = [server.register(f"{name}-{secrets.token_hex(3)}") for name in ("bot", "friend")]
        ids = tuple([await _make_room(server.url, bot, friend) for _ in range(rooms)])
        log = directory / "homeserver.events"
        with log.open("ab", buffering=0) as file:
            reading = asyncio.create_task(_Timelines(server.url, friend.access_token, file).follow(every))
            callers = (BY_KEY, bearer(friend.access_token))
            try:
                yield Homeserver((server.url,), log, bot.access_token, callers, ids, scripted=False)
            finally:
                reading.cancel()
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def _make_room(url: str, bot: Account, friend: Account) -> str:
    body = {"preset": "public_chat", "power_level_content_override": {"state_default": 0}}
    room = str((await ask(url, bot.access_token, "POST", "createRoom", body))["room_id"])
    await ask(url, friend.access_token, "POST", f"join/{quote(room, safe='')}", {})
    return room


async def ask(url: str, token: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One call of the client API. Raises NoAnswer, also for an error."""
    client = Client(url)
    content = b"" if body is None else json.dumps(body).encode()
    try:
        answer = await client.ask(method, f"/_matrix/client/v3/{path}", content, bearer(token), seconds=60)
    finally:
        client.close()
    if answer.status != 200:
        raise NoAnswer(f"{method} {path}: {answer.status} {answer.body[:200].decode(errors='replace')}")
    return answer.json()


class _Timelines:
    """Reads on in all rooms as a member does: by sync."""

    def __init__(self, url: str, token: str, log: RawIOBase) -> None:
        self._url = url
        self._token = token
        self._log = log
        self._since = ""

    async def follow(self, every: float) -> None:
        """Until cancelled."""
        while True:
            with suppress(NoAnswer):
                await self._read()
            await asyncio.sleep(every)

    async def _read(self) -> None:
        since = f"&since={self._since}" if self._since else ""
        page = await ask(self._url, self._token, "GET", f"sync?timeout=0&filter={quote(json.dumps(FILTER))}{since}")
        self._since = page["next_batch"]
        for room, found in page.get("rooms", {}).get("join", {}).items():
            ours = [event for event in found["timeline"]["events"] if "n" in event["content"]]
            self._log.write("".join(json.dumps(_line(room, event)) + "\n" for event in ours).encode())


def _line(room: str, event: dict[str, Any]) -> dict[str, Any]:
    """As the scripted homeserver logs it; `mark`: what else the content says."""
    return {
        "room": room,
        "sender": event["sender"],
        "txn_id": event.get("unsigned", {}).get("transaction_id"),
        "n": event["content"]["n"],
        "mark": event["content"].get("mark"),
        "event_id": event["event_id"],
        "at": event["origin_server_ts"] / 1000,
    }
