"""A member of encrypted rooms, with a client of its own: what it can read there is what has arrived."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowbridge.cli.demo.synapse import Account, LocalSynapse, SynapseError
from tests.chaos.client import NoAnswer
from tests.chaos.options import CannotRun
from tests.chaos.real import FILTER, PAGE, ask
from tests.peer import Peer

ROTATION = 30  # messages, so that sessions end and begin while bridges are killed
READ_SECONDS = 20.0  # for a key that comes late


@dataclass
class Witness:
    """`unread`: events that it could not decrypt, and why; `plain`: those that were not encrypted.

    `devices`: those that encrypted them.
    """

    bot: Account
    rooms: tuple[str, ...]
    homeserver: LocalSynapse
    peer: Peer
    friend: Account
    unread: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)
    _since: str = ""

    async def follow(self, log: RawIOBase, every: float) -> None:
        """Until cancelled: a line of the log for each event, in the order of its room."""
        while True:
            with suppress(NoAnswer):
                await self._look(log)
            await asyncio.sleep(every)

    async def _look(self, log: RawIOBase) -> None:
        """The timelines by sync, without a client's own ideas of them; then each event as the client shows it."""
        since = f"&since={self._since}" if self._since else ""
        path = f"sync?timeout=0&filter={quote(json.dumps(FILTER))}{since}"
        page = await ask(self.homeserver.url, self.friend.access_token, "GET", path)
        for room, found in page.get("rooms", {}).get("join", {}).items():
            for event in found["timeline"]["events"]:
                if event["sender"] == self.bot.user_id and "state_key" not in event:
                    await self._read(room, event, log)
        self._since = page["next_batch"]

    async def _read(self, room: str, event: dict[str, Any], log: RawIOBase) -> None:
        if event["type"] != "m.room.encrypted":
            self.plain.append(event["event_id"])
            return
        self.devices.add(event["content"]["device_id"])
        shown = await asyncio.to_thread(self.peer.read, event["event_id"], patience=READ_SECONDS)
        if shown.get("missing") or shown["failure"] or "n" not in shown["content"]:
            self.unread.append(f"{event['event_id']}: {shown.get('failure')}")
            return
        line = {
            "room": room,
            "sender": event["sender"],
            "txn_id": None,
            "n": shown["content"]["n"],
            "event_id": event["event_id"],
            "at": event["origin_server_ts"] / 1000,
        }
        log.write(json.dumps(line).encode() + b"\n")


@asynccontextmanager
async def witness(log: Path, rooms: int, *, every: float = 0.5) -> AsyncIterator[Witness]:
    """A real homeserver with a bot, and this many encrypted rooms that the witness is in. Raises CannotRun."""
    server = LocalSynapse(rate_limits=False, config={"filter_timeline_limit": PAGE})
    try:
        await asyncio.to_thread(server.__enter__)
    except SynapseError as error:
        raise CannotRun(str(error)) from None
    try:
        bot, friend = [server.register(f"{name}-{secrets.token_hex(3)}") for name in ("bot", "friend")]
        ids = tuple([await _make_room(server.url, bot, friend) for _ in range(rooms)])
        peer = Peer(server.url, friend)
        await asyncio.to_thread(peer.__enter__)
        try:
            found = Witness(bot, ids, server, peer, friend)
            with log.open("ab", buffering=0) as file:
                following = asyncio.create_task(found.follow(file, every))
                try:
                    yield found
                finally:
                    following.cancel()
        finally:
            await asyncio.to_thread(peer.__exit__, None, None, None)
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def _make_room(url: str, bot: Account, friend: Account) -> str:
    content = {"algorithm": "m.megolm.v1.aes-sha2", "rotation_period_msgs": ROTATION}
    encryption = {"type": "m.room.encryption", "state_key": "", "content": content}
    body = {"preset": "public_chat", "initial_state": [encryption]}
    room = str((await ask(url, bot.access_token, "POST", "createRoom", body))["room_id"])
    await ask(url, friend.access_token, "POST", f"join/{quote(room, safe='')}", {})
    return room
