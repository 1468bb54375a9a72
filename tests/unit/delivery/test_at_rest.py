"""What becomes of contents in the store when their events have ended, and of those that cannot be read."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.fernet import Fernet

from flowbridge.delivery.pending import Keeps, PendingDelivery
from flowbridge.events.relations import Binding, Target
from flowbridge.store.contents import is_sealed
from tests.rig import ROOM, MakeRig, Rig, accept, error, soon, until
from tests.unit.delivery.test_encryption import Device

REFUSED = error(400, "M_BAD_JSON")


def unlock(rig: Rig, secret: bytes) -> None:
    rig.database.contents.unlock(secret.decode())


def sealed(rig: Rig, body: str, **how: Any) -> PendingDelivery:
    """As the acceptance makes it for a room of which nothing is known, from a body that was not the content."""
    pending = rig.pending(body, waits=False, **how)
    pending.renew(pending.row._replace(is_sealed=True))
    pending.request = json.dumps({"payload": body})
    return pending


def kinds(rig: Rig) -> list[tuple[str, str]]:
    return [tuple(map(_kind, row)) for row in rig.rows("content", "request")]  # type: ignore[misc]


def _kind(text: str | None) -> str:
    return "blank" if not text else "sealed" if is_sealed(text) else "clear"


@pytest.mark.parametrize(
    ("keeps", "encrypted", "open_"),
    [("all", "sealed", "clear"), ("plain", "blank", "clear"), ("none", "blank", "blank")],
)
async def test_content_is_kept_as_the_setting_says(make: MakeRig, keeps: Keeps, encrypted: str, open_: str) -> None:
    async with make(refuse_encrypted=True) as rig:
        unlock(rig, Fernet.generate_key())
        rig.worker._shared = replace(rig.worker._shared, keeps=keeps)
        rig.encryption._devices = device = Device()
        for number, is_plain in enumerate((False, True)):
            device.is_plain = is_plain
            room = f"!{number}:hs"
            pending = rig.pending("a", room)
            rig.worker.offer(pending)
            await rig.worker.wait(pending, 10.0)
        await rig.settled(2)
        await rig.database.flush()
        assert [content for content, _ in kinds(rig)] == [encrypted, open_]


async def test_events_are_sent_and_settled_while_their_rows_are_sealed(make: MakeRig) -> None:
    async with make(refuse_encrypted=True) as rig:
        unlock(rig, Fernet.generate_key())
        rig.encryption._devices = Device()
        rig.rooms.then(accept, REFUSED)
        for body in ("a", "b"):
            pending = sealed(rig, body)
            rig.worker.offer(pending)
            await soon(pending.committed)
        await rig.settled(2)
        assert kinds(rig) == [("sealed", "sealed")] * 2
        assert rig.states() == ["sent", "dead"]


async def test_relations_of_a_sealed_event_are_written_sealed(make: MakeRig) -> None:
    secret = Fernet.generate_key()
    async with make() as rig:
        unlock(rig, secret)
        first = sealed(rig, "a")
        reply = sealed(rig, "b", binding=Binding(reply_to=Target("delivery", first.row.delivery)))
        for pending in (first, reply):
            rig.worker.offer(pending)
        await rig.settled(2)
        assert kinds(rig) == [("sealed", "sealed")] * 2
        assert rig.rooms.sends[1].content["m.relates_to"] == {"m.in_reply_to": {"event_id": "$1"}}


async def test_event_that_another_secret_key_encrypted_waits_for_that_key(make: MakeRig) -> None:
    right, wrong = Fernet.generate_key(), Fernet.generate_key()
    make.tune(first_pause=0.01, max_pause=0.02)
    async with make() as rig:
        unlock(rig, right)
        hold = asyncio.Event()
        rig.rooms.always(lambda rooms, sent: _never(hold))
        story = Binding(key="story")
        for pending in (sealed(rig, "a"), sealed(rig, "b", binding=story), sealed(rig, "c")):
            rig.worker.offer(pending)
            await soon(pending.committed)
        await rig.crash()
    rig.rooms.sends.clear()
    rig.rooms.always(None)
    async with make() as rig:
        unlock(rig, wrong)
        await until(lambda: any("FLOWBRIDGE_SECRET_KEY" in history for history in rig.rows("history")))
        assert rig.states() == ["queued"] * 3
        assert rig.rooms.sends == []
        await rig.crash()
    async with make() as rig:
        unlock(rig, right)
        await rig.settled()
        assert rig.states() == ["sent"] * 3
        assert rig.rooms.bodies(ROOM) == ["a", "b", "c"]


async def _never(event: asyncio.Event) -> Any:
    await event.wait()
