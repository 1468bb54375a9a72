"""The account's key backup: asked for one key at a time, and believed in nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vodozemac
from hypothesis import given

from flowbridge.encryption import unpadded
from flowbridge.encryption.backup import AGAIN_SECONDS, ALGORITHM, MAX_WAITING
from flowbridge.encryption.inbound import Undecryptable
from flowbridge.encryption.olm import Account, Backup, InboundGroup, OutboundGroup
from flowbridge.errors import BadGateway
from tests.unit.encryption.json_values import VALUES
from tests.unit.encryption.test_hostile import MALLORY, MEGOLM, World, patient

PRIVATE = bytes(range(32))
PUBLIC = Backup(PRIVATE).public_key
VERSION = {"algorithm": ALGORITHM, "version": "1", "auth_data": {"public_key": PUBLIC}}


class Kept:
    """A homeserver that has a backup; counts what it is asked."""

    def __init__(self, world: World) -> None:
        self.version: Any = VERSION
        self.answer: Any = None
        self.asked: list[tuple[str, str]] = []
        world.server.backup_version = self._version  # type: ignore[attr-defined]
        world.server.backed_up = self._backed_up  # type: ignore[attr-defined]

    async def _version(self) -> Any:
        return self.version

    async def _backed_up(self, room_id: str, session_id: str, version: str) -> Any:
        assert version == "1"
        self.asked.append((room_id, session_id))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.machine.device.secrets["backup_key"] = unpadded.encode(PRIVATE)
    yield world
    world.close()


def sealed(value: Any) -> dict[str, Any]:
    """As a client puts it there."""
    key = vodozemac.PkEncryption.from_key(vodozemac.Curve25519PublicKey.from_base64(PUBLIC))
    message = key.encrypt(json.dumps(value).encode())
    parts = {name: unpadded.encode(getattr(message, name)) for name in ("ciphertext", "mac")}
    return {"session_data": {**parts, "ephemeral": unpadded.encode(message.ephemeral_key)}}


def told(group: OutboundGroup) -> dict[str, Any]:
    return {
        "algorithm": MEGOLM,
        "sender_key": Account().curve25519,
        "sender_claimed_keys": {"ed25519": "x"},
        "session_key": InboundGroup.from_key(group.key).export(),
    }


def event(group: OutboundGroup) -> dict[str, Any]:
    plain = {"type": "m.room.message", "content": {"body": "old"}, "room_id": "!r:hs"}
    content = {"algorithm": MEGOLM, "session_id": group.id, "ciphertext": group.encrypt(json.dumps(plain).encode())}
    return {"sender": MALLORY, "event_id": "$e", "content": content}


def test_key_that_is_missing_is_fetched_and_kept_and_proves_nobody(world: World) -> None:
    kept, group = Kept(world), OutboundGroup()
    kept.answer = sealed(told(group))
    came: list[Any] = []
    world.machine._on_keys = came.extend
    message = event(group)
    with pytest.raises(Undecryptable):
        world.do(world.machine.decrypt("!r:hs", message))
    assert kept.asked == []
    found = world.do(world.machine.decrypt("!r:hs", message, restore=True))
    assert (found.event["content"], found.verified, found.device_id) == ({"body": "old"}, False, "")
    assert came == kept.asked == [("!r:hs", group.id)]
    world.do(world.machine.decrypt("!r:hs", message, restore=True))
    assert len(kept.asked) == 1


def test_key_that_is_not_there_is_asked_for_once_in_a_while(world: World) -> None:
    kept, message = Kept(world), event(OutboundGroup())
    for answer in (None, BadGateway("away")):
        kept.answer = answer
        for _ in range(3):
            with pytest.raises(Undecryptable, match="has not come"):
                world.do(world.machine.decrypt("!r:hs", message, restore=True))
    assert len(kept.asked) == 1
    assert AGAIN_SECONDS >= 60


def test_readers_beyond_the_bound_do_without(world: World) -> None:
    kept = Kept(world)
    world.machine.backup._waiting = MAX_WAITING
    assert not world.do(world.machine.backup.fetch("!r:hs", "S"))
    assert kept.asked == []


@pytest.mark.parametrize(
    "version",
    [
        None,
        {**VERSION, "algorithm": "org.example"},
        {**VERSION, "auth_data": {"public_key": Account().curve25519}},
        {**VERSION, "auth_data": 7},
        {**VERSION, "version": 1},
        {**VERSION, "version": "1" * 65},
    ],
)
def test_backup_of_another_key_is_not_asked(world: World, version: Any) -> None:
    kept = Kept(world)
    kept.version = version
    assert not world.do(world.machine.backup.fetch("!r:hs", "S"))
    assert kept.asked == []


def test_key_of_another_session_is_not_taken(world: World) -> None:
    kept, group = Kept(world), OutboundGroup()
    kept.answer = sealed(told(OutboundGroup()))
    assert not world.do(world.machine.backup.fetch("!r:hs", group.id))


@patient
@given(VALUES)
def test_no_answer_of_a_backup_breaks_it(hostile: World, value: Any) -> None:
    kept, backup, group = Kept(hostile), hostile.machine.backup, OutboundGroup()
    data = sealed(told(group))["session_data"]
    answers = [value if isinstance(value, dict) else {}, {"session_data": value}]
    answers += [{"session_data": {**data, name: value}} for name in data]
    answers += [sealed(value), sealed({**told(group), "session_key": value})]
    claims = sealed({**told(group), "sender_key": value, "sender_claimed_keys": value})
    for answer in (*answers, claims):
        kept.answer = answer
        backup._missing.clear()
        backup._asked_at = -1e9
        is_taken = hostile.do(backup.fetch("!r:hs", group.id))
        assert not is_taken or (answer is claims and isinstance(value, str))  # what it says of its maker is only kept


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("backup"))
    world.machine.device.secrets["backup_key"] = unpadded.encode(PRIVATE)
    yield world
    world.close()
