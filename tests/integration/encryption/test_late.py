"""Keys that come after the events that they are for."""

import asyncio
from typing import Any

import pytest

from tests.integration.encryption.bot import Bot
from tests.integration.encryption.test_rooms import body, joined
from tests.patience import PATIENCE
from tests.peer import Peer


async def test_event_whose_key_comes_later_is_told_again_decrypted(
    device: Bot, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = device.devices()
    told: asyncio.Queue[tuple[str, str, dict[str, Any]]] = asyncio.Queue()
    devices.on_late = lambda *what: told.put_nowait(what)
    room = await device.room()
    await joined(peer, room)
    await body(peer, await device.send(room, "hello"))
    machine, sync = device.machine, device.keeper.server.sync

    async def held_back(filter_: Any, since: str, *, wait: float = 0.0) -> tuple[Any, str]:
        return {"next_batch": since}, since

    monkeypatch.setattr(device.keeper.server, "sync", held_back)
    await machine.fresh(0.0)  # one that was on its way is over
    event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "late"})
    event = await device.event(room, event_id)
    first = await devices.shown(device.account.user_id, room, event, late=True)
    assert first["type"] == "m.room.encrypted"
    assert "has not come" in first["flowbridge"]["undecryptable"]
    monkeypatch.setattr(device.keeper.server, "sync", sync)
    async with asyncio.timeout(PATIENCE):
        user_id, where, again = await told.get()
    assert (user_id, where, again["event_id"]) == (device.account.user_id, room, event_id)
    assert again["content"] == {"msgtype": "m.text", "body": "late"}
    assert again["flowbridge"]["verified"]
    assert again["flowbridge"]["decrypted_later"]
    assert told.empty()


async def test_only_the_bot_s_own_events_are_decrypted(device: Bot, peer: Peer) -> None:
    devices = device.devices()
    room = await device.room()
    event = await device.event(room, await device.send(room, "hello"))
    assert await devices.shown("@someone:else", room, event) is event
    plain = {"type": "m.room.message", "content": {}}
    assert await devices.shown(device.account.user_id, room, plain) is plain
    shown = await devices.shown(device.account.user_id, room, event)
    assert shown["content"]["body"] == "hello"
