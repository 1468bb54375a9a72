"""Floods: what a hostile homeserver, or many strangers, send at once costs a bounded time, log and memory."""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from benchmarks.devices import Keys
from flowbridge.encryption import complaints, peers, rooms
from flowbridge.encryption.complaints import Complaints
from flowbridge.encryption.identities import Device, UserKeys
from flowbridge.encryption.outbound import Holder
from flowbridge.errors import MatrixError, NotFound
from tests.patience import PATIENCE
from tests.unit.encryption.test_hostile import MALLORY, ME, OLM, World

T = TypeVar("T")
FLOOD = 40_000
STALL_SECONDS = 0.05


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def stall(world: World, work: Awaitable[T]) -> tuple[T, float]:
    """What it gives, and the longest turn that the event loop had meanwhile: in time of the processor, since others
    use this machine, too."""

    async def watched() -> tuple[T, float]:
        worst, ends = 0.0, False

        async def watch() -> None:
            nonlocal worst
            while not ends:
                began = time.thread_time()
                await asyncio.sleep(0)
                worst = max(worst, time.thread_time() - began)

        watching = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        try:
            return await work, worst
        finally:
            ends = True
            await watching

    return world.do(watched())


def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("flowbridge.log.warning", lambda action, **_: lines.append(action))
    monkeypatch.setattr(complaints, "warn", Complaints().warn)
    return lines


def test_a_flood_of_messages_for_the_device_holds_nothing_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, own = logged(monkeypatch), world.machine.device.account.curve25519

    def message(number: int) -> dict[str, Any]:
        ciphertext = {own: {"type": 1, "body": f"rubbish{number:08}"}}
        content = {"algorithm": OLM, "sender_key": f"{number:043}", "ciphertext": ciphertext}
        return {"type": "m.room.encrypted", "sender": MALLORY, "content": content}

    events = [message(number) for number in range(FLOOD)]
    _, worst = stall(world, world.machine._absorb({"to_device": {"events": events}}, "next", []))
    assert worst < STALL_SECONDS
    assert lines.count("to_device_unreadable") == complaints.MOST
    assert len(world.machine._wedged) <= 10_000


def test_sync_without_messages_does_not_wait_for_a_key_that_is_being_shared(world: World) -> None:
    async def absorbed() -> None:
        async with world.machine.device.lock, asyncio.timeout(PATIENCE):
            counts = {"signed_curve25519": 1_000}
            sync = {"device_lists": {"changed": [MALLORY]}, "device_one_time_keys_count": counts}
            await world.machine._absorb(sync, "quiet", [])

    world.do(absorbed())
    assert world.machine.device.since == "quiet"


def keys_of(user_id: str, number: int) -> dict[str, Any]:
    return {each.device_id: each.published for each in (Keys(user_id, f"D{n}") for n in range(number))}


def test_keys_of_many_devices_hold_nothing_up(world: World) -> None:
    users = {f"@user{number}:hs": keys_of(f"@user{number}:hs", 100) for number in range(5)}
    world.server.answer = {"device_keys": users}
    found, worst = stall(world, world.machine.peers.of(list(users)))
    assert sum(len(user.devices) for user in found.values()) == 500
    assert worst < STALL_SECONDS


def test_device_that_claims_ours_never_gets_a_room_key(world: World) -> None:
    """Neither another under its name, nor one of someone else's with its key."""
    machine = world.machine
    own = machine.device
    claims = Keys(ME, own.device_id)
    mallory = machine.device.account.curve25519
    world.server.answer = {"device_keys": {ME: {own.device_id: claims.published, "OTHER": Keys(ME, "OTHER").published}}}
    users = dict(world.do(machine.peers.of([ME])))
    stolen = Device(MALLORY, "STOLEN", mallory, "E")
    users[MALLORY] = UserKeys(MALLORY, {"STOLEN": stolen})
    holders = world.do(machine.outbound._holders(users))
    assert [(holder.user_id, holder.device_id) for holder in holders] == [(ME, "OTHER")]


def test_what_is_known_of_users_and_rooms_is_bounded_by_its_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = world.machine
    cache = machine.peers._cache
    for number in range(60):
        user = f"@user{number}:hs"
        devices = {f"D{n}": Device(user, f"D{n}", f"C{n}", "E") for n in range(2_000)}
        machine.peers._keep(UserKeys(user, devices))
    assert sum(len(keys.devices) for _, keys in cache.items()) <= peers.MAX_CACHED
    many = {f"@user{number}:hs": "join" for number in range(100_000)}

    async def members(_: str) -> dict[str, str]:
        return many

    monkeypatch.setattr(world.server, "members", members)
    for number in range(7):
        world.do(machine.rooms.get(f"!room{number}:hs"))
    assert sum(len(room.readers) for _, room in machine.rooms._rooms.items()) <= rooms.MAX_READERS
    session = world.do(machine.outbound._new("!room:hs"))
    session.shared = {Holder("@u:hs", str(number), "C") for number in range(1_000)}
    for number in range(300):
        machine.outbound._sessions.put(f"!r{number}", session, weight=1_000)
    assert len(machine.outbound._sessions) <= 200


def test_names_of_users_that_nobody_follows_do_not_pile_up(world: World) -> None:
    names = [f"@user{number}:hs" for number in range(2 * peers.MAX_OUTDATED)]
    _, worst = stall(world, world.machine._absorb({"device_lists": {"changed": names}}, "next", []))
    assert worst < STALL_SECONDS
    assert not world.machine.peers._outdated


def test_a_change_that_memory_has_forgotten_is_known_from_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MAX_OUTDATED", 0)
    machine = world.machine
    world.server.answer = {"device_keys": {MALLORY: keys_of(MALLORY, 1)}}
    assert len(world.do(machine.peers.of([MALLORY]))[MALLORY].devices) == 1
    world.server.answer = {"device_keys": {MALLORY: keys_of(MALLORY, 1) | {"NEW": Keys(MALLORY, "NEW").published}}}
    world.do(machine._absorb({"device_lists": {"changed": [MALLORY]}}, "next", []))
    assert not machine.peers._outdated
    assert "NEW" in world.do(machine.peers.of([MALLORY]))[MALLORY].devices


def test_rooms_that_cannot_be_asked_for_leave_nothing_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuses(room_id: str, type_: str) -> None:
        raise NotFound("no such room")

    monkeypatch.setattr(world.server, "state", refuses)
    for number in range(10):
        with pytest.raises(MatrixError):
            world.do(world.machine.rooms.get(f"!nowhere{number}:hs"))
    assert not world.machine.rooms._changes


def test_complaints_of_one_kind_are_counted_after_some(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr("flowbridge.log.warning", lambda action, **fields: said.append({"action": action, **fields}))
    now = 0.0
    warn = Complaints(lambda: now).warn
    for _ in range(complaints.MOST + 5):
        warn("bad", sender="x")
    warn("other")
    assert [each["action"] for each in said] == ["bad"] * complaints.MOST + ["other"]
    now = complaints.SECONDS
    warn("bad", sender="y")
    assert said[-1] == {"action": "bad", "sender": "y", "left_out": 5}
