"""What is said in encrypted rooms: who can read it, by which session, and whose it is."""

import asyncio
import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.encryption.inbound import Undecryptable
from flowbridge.errors import BadGateway, MatrixError, TooLarge
from tests.conftest import MakeAccount
from tests.integration.encryption.bot import Bot, sqlite
from tests.peer import Peer

MISMATCHED_SENDER = 8  # matrix-js-sdk's EventShieldReason
UNREAD_SECONDS = 3.0  # for which a key that should not come is waited for


@contextlib.asynccontextmanager
async def another(synapse: LocalSynapse, account: Account, **options: bool) -> AsyncIterator[Peer]:
    """A client for this test alone."""
    peer = Peer(synapse.url, account, **options)
    await asyncio.to_thread(peer.__enter__)
    try:
        yield peer
    finally:
        await asyncio.to_thread(peer.__exit__, None, None, None)


async def joined(peer: Peer, room: str) -> None:
    await asyncio.to_thread(peer.ask, "join", room=room)


async def shown(peer: Peer, event_id: str, **options: float) -> dict[str, Any]:
    return await asyncio.to_thread(peer.read, event_id, **options)


async def body(peer: Peer, event_id: str) -> str:
    found = await shown(peer, event_id)
    assert found["failure"] is None, found
    return str(found["content"]["body"])


async def test_strict_client_reads_the_bot_without_a_warning_and_is_read_by_it(device: Bot, peer: Peer) -> None:
    room = await device.room()
    await joined(peer, room)
    found = await shown(peer, await device.send(room, "to you"))
    assert (found["content"], found["encrypted"]) == ({"msgtype": "m.text", "body": "to you"}, True)
    assert (found["failure"], found["shield"], found["reason"]) == (None, 0, None)
    event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "and to you"})
    back = await device.read(room, event_id)
    assert back.event["content"] == {"msgtype": "m.text", "body": "and to you"}
    assert (back.event["type"], back.event["event_id"]) == ("m.room.message", event_id)
    assert (back.device_id, back.verified) == (peer.me["device_id"], True)


async def test_bot_reads_what_it_said_itself(device: Bot) -> None:
    room = await device.room()
    back = await device.read(room, await device.send(room, "mine"))
    assert back.event["content"]["body"] == "mine"
    assert (back.device_id, back.verified) == (device.account.device_id, True)


async def test_relation_stands_outside_and_comes_back(device: Bot, peer: Peer) -> None:
    room = await device.room()
    await joined(peer, room)
    relation = {"rel_type": "m.thread", "event_id": await device.send(room, "root")}
    content = {"msgtype": "m.text", "body": "in a thread", "m.relates_to": relation}
    sealed = await device.machine.encrypt(room, "m.room.message", content, "d")
    assert sealed is not None
    assert json.loads(sealed)["m.relates_to"] == relation
    event_id = await device.put(room, sealed)
    assert (await shown(peer, event_id))["relation"] == relation
    assert (await device.read(room, event_id)).event["content"] == content


async def test_room_that_is_not_encrypted_is_told(device: Bot) -> None:
    room = (await device.call("POST", "createRoom", {}))["room_id"]
    assert await device.machine.encrypt(room, "m.room.message", {"body": "x"}, "d") is None


async def test_room_that_was_encrypted_stays_so_whatever_the_homeserver_says(
    device: Bot, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = await device.room()
    await device.encrypt(room, "before")

    async def denies(room_id: str, type_: str) -> None:
        return None

    monkeypatch.setattr(device.keeper.server, "state", denies)
    device.machine.rooms.forget_all()
    assert b"m.megolm" in await device.encrypt(room, "after")


# sessions


def session(ciphertext: bytes) -> str:
    return str(json.loads(ciphertext)["session_id"])


async def test_session_ends_after_as_many_messages_as_the_room_asks_for(device: Bot, peer: Peer) -> None:
    room = await device.room(rotation_period_msgs=5)
    await joined(peer, room)
    made = [await device.encrypt(room, str(number)) for number in range(12)]
    assert list(Counter(map(session, made)).values()) == [5, 5, 2]
    event_ids = [await device.put(room, each) for each in made]
    assert [await body(peer, event_id) for event_id in event_ids] == [str(number) for number in range(12)]


async def test_one_who_left_cannot_read_what_is_said_later(
    device: Bot, synapse: LocalSynapse, make_account: MakeAccount, peer: Peer
) -> None:
    room = await device.room()
    await joined(peer, room)
    async with another(synapse, make_account()) as leaver:
        await joined(leaver, room)
        before = await device.encrypt(room, "before")
        assert await body(leaver, await device.put(room, before)) == "before"
        await asyncio.to_thread(leaver.ask, "leave", room=room)
    after = await device.encrypt(room, "after")
    assert session(after) != session(before)
    assert await body(peer, await device.put(room, after)) == "after"


async def test_one_who_is_kicked_cannot_read_what_is_said_later(device: Bot, peer: Peer) -> None:
    room = await device.room()
    await joined(peer, room)
    before = await device.encrypt(room, "before")
    await device.call("POST", f"rooms/{room}/kick", {"user_id": peer.me["user_id"]})
    assert session(await device.encrypt(room, "after")) != session(before)


async def test_one_who_joins_reads_from_then_on_by_the_same_session(device: Bot, peer: Peer) -> None:
    room = await device.room()
    before = await device.encrypt(room, "before")
    unread = await device.put(room, before)
    await joined(peer, room)
    after = await device.encrypt(room, "after")
    assert session(after) == session(before)
    assert await body(peer, await device.put(room, after)) == "after"
    assert (await shown(peer, unread, patience=UNREAD_SECONDS))["failure"] is not None


async def test_invited_user_reads_what_was_said_before_it_joins(device: Bot, peer: Peer) -> None:
    room = await device.room(peer.me["user_id"])
    event_id = await device.send(room, "you will see")
    await joined(peer, room)
    assert await body(peer, event_id) == "you will see"


@pytest.mark.parametrize("down", [False, True], ids=["while the bridge runs", "while it is down"])
async def test_new_device_of_a_member_reads_from_then_on(
    synapse: LocalSynapse, make_account: MakeAccount, bot: Account, tmp_path: Path, secret: str, down: bool
) -> None:
    member = make_account()
    first = Bot(synapse, bot, sqlite(tmp_path), secret)
    async with first.running(), another(synapse, member, strict=False, signed=False) as old:
        room = await first.room()
        await joined(old, room)
        assert await body(old, await first.send(room, "one")) == "one"
        if not down:
            async with another(synapse, member, strict=False, signed=False) as new:
                assert await body(new, await first.send(room, "two")) == "two"
    if down:
        second = Bot(synapse, bot, sqlite(tmp_path), secret)
        async with another(synapse, member, strict=False, signed=False) as new, second.running():
            assert await body(new, await second.send(room, "two")) == "two"


async def test_nothing_is_sent_until_the_keys_have_been(
    device: Bot, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = await device.room()
    await joined(peer, room)
    send = device.keeper.server.send_to_device
    lost = 2

    async def fails(type_: str, messages: Mapping[str, Mapping[str, Any]]) -> None:
        nonlocal lost
        if lost:
            lost -= 1
            raise BadGateway("the connection was reset")
        await send(type_, messages)

    monkeypatch.setattr(device.keeper.server, "send_to_device", fails)
    for _ in range(2):
        with pytest.raises(MatrixError, match="reset"):
            await device.encrypt(room, "hello", "d")
    assert await body(peer, await device.send(room, "hello", "d")) == "hello"


# each message once


async def test_retry_sends_the_same_bytes_also_after_a_restart(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str, peer: Peer
) -> None:
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        room = await device.room()
        await joined(peer, room)
        made = await device.encrypt(room, "once", "delivery")
        assert await device.encrypt(room, "once", "delivery") == made
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        assert await device.encrypt(room, "once", "delivery") == made
        next_ = await device.encrypt(room, "next")
        assert session(next_) == session(made)
        assert await body(peer, await device.put(room, made)) == "once"
        assert await body(peer, await device.put(room, next_)) == "next"


async def test_three_hundred_at_once_in_three_rooms_are_each_a_message_of_its_own(device: Bot, peer: Peer) -> None:
    rooms = [await device.room(), await device.room(), await device.room(rotation_period_msgs=7)]
    for room in rooms:
        await joined(peer, room)
    names = [(room, f"{number}") for number in range(100) for room in rooms]
    made = await asyncio.gather(*(device.encrypt(room, name, f"{room} {name}") for room, name in names))
    assert len(set(made)) == 300
    last = dict(zip(names, made, strict=True))
    for room in rooms:
        assert await body(peer, await device.put(room, last[room, "99"])) == "99"


async def test_failed_commit_leaves_no_hole_and_no_index_twice(
    device: Bot, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = await device.room()
    await joined(peer, room)
    await device.encrypt(room, "first")
    commit = device.machine.device.commit

    async def fails(changes: object) -> None:
        raise BadGateway("the store is away")

    monkeypatch.setattr(device.machine.device, "commit", fails)
    with pytest.raises(MatrixError, match="away"):
        await device.encrypt(room, "second", "d")
    monkeypatch.setattr(device.machine.device, "commit", commit)
    assert await body(peer, await device.send(room, "second", "d")) == "second"
    assert await body(peer, await device.send(room, "third")) == "third"


async def test_content_that_does_not_fit_is_refused_with_the_number(device: Bot) -> None:
    room = await device.room()
    with pytest.raises(TooLarge, match=r"at most about 4[78],\d{3} bytes|at most about 4[78]\d{3} bytes"):
        await device.encrypt(room, "x" * 50_000)
    event_id = await device.send(room, "x" * 47_500)
    assert len((await device.read(room, event_id)).event["content"]["body"]) == 47_500


# whose it is


async def test_event_with_another_sender_is_never_verified(device: Bot, peer: Peer) -> None:
    room = await device.room()
    await joined(peer, room)
    event_id = await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "from me"})
    event = await device.event(room, event_id)
    await device.machine.fresh(0.0)
    tampered = await device.machine.decrypt(room, {**event, "sender": device.account.user_id})
    assert (tampered.device_id, tampered.verified) == ("", False)
    assert (await device.machine.decrypt(room, event)).verified


async def test_device_that_its_owner_did_not_sign_is_not_verified(
    device: Bot, synapse: LocalSynapse, make_account: MakeAccount
) -> None:
    room = await device.room()
    async with another(synapse, make_account(), strict=False, signed=False) as unsigned:
        await joined(unsigned, room)
        event_id = await asyncio.to_thread(unsigned.send, room, {"msgtype": "m.text", "body": "from anyone"})
        found = await device.read(room, event_id)
        assert (found.device_id, found.verified) == (unsigned.me["device_id"], False)


async def test_message_that_is_shown_again_is_refused(device: Bot, peer: Peer) -> None:
    room = await device.room()
    await joined(peer, room)
    event = await device.event(room, await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "pay 1"}))
    await device.machine.fresh(0.0)
    for _ in range(2):
        assert (await device.machine.decrypt(room, event)).event["content"]["body"] == "pay 1"
    with pytest.raises(Undecryptable, match="repeats"):
        await device.machine.decrypt(room, {**event, "event_id": "$another"})
    device.machine.inbound._indexes.clear()
    with pytest.raises(Undecryptable, match="repeats"):
        await device.machine.decrypt(room, {**event, "event_id": "$another"})


async def test_message_is_of_its_room_alone(device: Bot, peer: Peer) -> None:
    room, other = await device.room(), await device.room()
    await joined(peer, room)
    event = await device.event(room, await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "here"}))
    await device.machine.fresh(0.0)
    with pytest.raises(Undecryptable, match="has not come"):
        await device.machine.decrypt(other, event)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"algorithm": "m.olm.v1.curve25519-aes-sha2"},
        {"algorithm": "m.megolm.v1.aes-sha2"},
        {"algorithm": "m.megolm.v1.aes-sha2", "session_id": [], "ciphertext": {}},
        {"algorithm": "m.megolm.v1.aes-sha2", "session_id": "\ud800\0", "ciphertext": "AAAA"},
    ],
)
async def test_what_is_malformed_is_told_as_such(device: Bot, content: dict[str, Any]) -> None:
    event = {"type": "m.room.encrypted", "sender": "@x:y", "event_id": "$e", "content": content}
    with pytest.raises(Undecryptable):
        await device.machine.decrypt("!r:hs", event)


async def test_nothing_that_was_said_is_in_either_database(
    synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str, peer: Peer
) -> None:
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        room = await device.room()
        await joined(peer, room)
        await body(peer, await device.send(room, "the eagle has landed"))
        await device.read(
            room, await asyncio.to_thread(peer.send, room, {"msgtype": "m.text", "body": "the eagle is back"})
        )
        seeds = device.machine.device.secrets["cross_signing"].values()
        for folder in (tmp_path, synapse.directory):
            for path in folder.rglob("*.db*"):
                held = path.read_bytes()
                for words in (b"eagle", *(seed.encode() for seed in seeds)):
                    assert words not in held, f"{words!r} in {path}"
    with sqlite3.connect(tmp_path / "flowbridge.db") as connection:
        assert connection.execute("SELECT count(*) FROM crypto_room_keys").fetchone()[0] >= 2
    connection.close()
