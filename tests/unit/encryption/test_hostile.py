"""A device at work, whatever a homeserver or another device sends: logged and dropped, never a crash."""

import asyncio
import json
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, given, settings

from flowbridge.encryption import complaints, signatures
from flowbridge.encryption.channels import Received
from flowbridge.encryption.inbound import Undecryptable
from flowbridge.encryption.key_server import KeyServer
from flowbridge.encryption.machine import Machine
from flowbridge.encryption.olm import Account, OutboundGroup
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.sealing import Seal
from flowbridge.encryption.setup import new_device
from flowbridge.errors import MatrixError
from flowbridge.events import canonical_json
from flowbridge.store import Database, clock, crypto
from flowbridge.store.crypto import Changes
from tests.unit.encryption.json_values import TEXTS, VALUES

T = TypeVar("T")
ME = "@bot:hs"
MALLORY = "@mallory:hs"
MEGOLM = "m.megolm.v1.aes-sha2"
OLM = "m.olm.v1.curve25519-aes-sha2"


class Hostile:
    """A homeserver that answers each question about keys with whatever it is told to."""

    def __init__(self) -> None:
        self.answer: Any = {}

    async def upload(self, body: Any) -> Any:
        return {}

    async def query(self, users: Any) -> Any:
        return self.answer if isinstance(self.answer, dict) else {}

    async def claim(self, devices: Any) -> Any:
        return self.answer if isinstance(self.answer, dict) else {}

    async def send_to_device(self, type_: str, messages: Any) -> None:
        json.dumps(messages)

    async def upload_signatures(self, body: Any) -> Any:
        return {}

    async def state(self, room_id: str, type_: str) -> Any:
        return {"algorithm": MEGOLM} if type_ == "m.room.encryption" else None

    async def members(self, room_id: str) -> dict[str, str]:
        return {MALLORY: "join"}


class World:
    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = Hostile()
        self.database = Database(f"sqlite:///{folder}/flowbridge.db")
        self.database.open()
        self.machine = self.do(self._made())

    def do(self, work: Awaitable[T]) -> T:
        found: T = self.loop.run_until_complete(work)
        return found

    async def _made(self) -> Machine:
        self.database.start()
        seal = Seal(Fernet.generate_key().decode())
        stored = new_device(seal, ME, "DEVICE")
        await self.database.run(lambda connection: crypto.create(connection, "a", stored, 1))
        lease = await self.database.run(lambda connection: crypto.claim(connection, "a", "me", 600_000, alone=True))
        assert lease is not None
        machine = Machine(OwnDevice(self.database, seal, lease, stored), cast("KeyServer", self.server))
        await machine.begin()
        return machine

    def close(self) -> None:
        self.do(self.database.stop())
        self.loop.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("hostile"))
    yield world
    world.close()


patient = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(VALUES, TEXTS)
def test_no_sync_breaks_it(world: World, value: Any, text: str) -> None:
    own = world.machine.device.account.curve25519
    message = {"algorithm": OLM, "sender_key": text}
    to_device = [
        value,
        {"type": "m.room.encrypted", "sender": MALLORY, "content": value},
        {"type": "m.room.encrypted", "sender": MALLORY, "content": {**message, "ciphertext": {own: value}}},
        {
            "type": "m.room.encrypted",
            "sender": MALLORY,
            "content": {**message, "ciphertext": {own: {"type": 0, "body": text}}},
        },
        {"type": "m.room_key.withheld", "sender": MALLORY, "content": value},
    ]
    for sync in (
        value if isinstance(value, dict) else {},
        {"to_device": {"events": to_device}, "device_lists": {"changed": value, "left": [value, text]}},
        {"device_lists": value, "device_one_time_keys_count": value, "device_unused_fallback_key_types": value},
        {"device_one_time_keys_count": {"signed_curve25519": value}, "rooms": {"join": value}},
        {"rooms": {"join": {text: {"timeline": value, "state": value}}}},
    ):
        world.do(world.machine._absorb(sync, "next", []))


@patient
@given(VALUES, TEXTS)
def test_no_verification_breaks_it(world: World, value: Any, text: str) -> None:
    verifications = world.machine.verifications
    verifications.users = frozenset({MALLORY})
    account = Account()
    keys = {"curve25519:X": account.curve25519, "ed25519:X": account.ed25519}
    device = {"user_id": MALLORY, "device_id": "X", "keys": keys, "algorithms": [OLM, MEGOLM]}
    signed = signatures.add(device, MALLORY, "X", account.sign(signatures.signed_part(device)))
    master = {"user_id": MALLORY, "usage": ["master"], "keys": {f"ed25519:{text}": text}}
    world.server.answer = {"device_keys": {MALLORY: {"X": signed}}, "master_keys": {MALLORY: master}}
    request = {"from_device": "X", "methods": ["m.sas.v1"], "timestamp": clock.now_ms(), "transaction_id": "T"}
    steps: list[Any] = [value, {"transaction_id": text, "from_device": value}]
    steps += [{**request, name: each} for name in request for each in (value, text)]
    for content in (*steps, request, {"transaction_id": "T", "method": value, "key": text, "mac": value}):
        for kind in ("request", "start", "key", "mac", "done", "cancel", text):
            event = {"type": f"m.key.verification.{kind}", "sender": MALLORY, "content": content}
            verifications.take([event, {**event, "sender": value}, {**event, "type": value}])
    world.do(verifications.handle())
    assert verifications.last is None or not verifications.last.succeeded


def test_strangers_who_ask_for_verification_are_some_lines_a_minute(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(complaints, "warn", complaints.Complaints().warn)
    request = {"type": "m.key.verification.request", "sender": MALLORY, "content": {}}
    world.machine.verifications.users = frozenset()
    with caplog.at_level("INFO"):
        world.machine.verifications.take([request] * 1_000)
    assert sum("verification_not_taken" in record.getMessage() for record in caplog.records) == complaints.MOST


@patient
@given(VALUES)
def test_no_answer_about_keys_breaks_a_send(world: World, value: Any) -> None:
    device = {"user_id": MALLORY, "device_id": "X", "keys": value, "signatures": value, "algorithms": value}
    for answer in (value, {"device_keys": {MALLORY: value}}, {"device_keys": {MALLORY: {"X": device}}}):
        world.server.answer = answer
        world.machine.peers.mark([MALLORY])
        try:
            made = world.do(world.machine.encrypt("!room:hs", "m.room.message", {"body": "secret"}, "d"))
        except MatrixError:
            continue
        assert made is not None
        assert b"secret" not in made


@patient
@given(VALUES, TEXTS)
def test_no_event_breaks_a_reader(world: World, value: Any, text: str) -> None:
    for content in (
        value,
        {"algorithm": MEGOLM, "session_id": text, "ciphertext": value},
        {"algorithm": MEGOLM, "session_id": value, "ciphertext": text},
    ):
        for sender in (text, value, ME):
            with pytest.raises(Undecryptable):
                world.do(world.machine.decrypt("!r:hs", {"sender": sender, "event_id": value, "content": content}))


@patient
@given(VALUES, TEXTS)
def test_nothing_that_decrypts_to_rubbish_is_an_event(world: World, value: Any, text: str) -> None:
    group, machine = OutboundGroup(), world.machine
    key = {"algorithm": MEGOLM, "room_id": "!r:hs", "session_id": group.id, "session_key": group.key}
    changes = Changes()
    taken = machine.inbound.take([Received(MALLORY, Account().curve25519, "e", "m.room_key", key)], changes)
    world.do(machine.device.commit(changes))
    machine.inbound.taken(taken)
    for plain in (
        {"no": value},
        {"type": value, "room_id": "!r:hs"},
        {"type": "t", "content": [value], "room_id": "!r:hs"},
        {"type": "t", "content": {}, "room_id": text},
    ):
        try:
            raw = canonical_json.write(plain)
        except (UnicodeEncodeError, ValueError):
            continue
        content = {"algorithm": MEGOLM, "session_id": group.id, "ciphertext": group.encrypt(raw)}
        with pytest.raises(Undecryptable, match=r"no event|another room"):
            world.do(machine.decrypt("!r:hs", {"sender": MALLORY, "event_id": "$e", "content": content}))


@patient
@given(VALUES, TEXTS)
def test_no_room_key_breaks_it(world: World, value: Any, text: str) -> None:
    group = OutboundGroup()
    right = {"algorithm": MEGOLM, "room_id": "!r:hs", "session_id": group.id, "session_key": group.key}
    for content in (
        value if isinstance(value, dict) else {},
        *({**right, name: each} for name in right for each in (value, text)),
    ):
        changes = Changes()
        world.machine.inbound.take([Received(MALLORY, "P", "E", "m.room_key", content)], changes)
        world.do(world.machine.device.commit(changes))
