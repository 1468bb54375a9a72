"""flowbridge.delivery.encryption: plain text does not go into encrypted rooms."""

import asyncio
import time

import pytest

from flowbridge.delivery import encryption
from flowbridge.errors import HomeserverError, MatrixError
from flowbridge.homeserver import answers as verdicts
from flowbridge.homeserver.answers import Verdict
from flowbridge.models.timing import Timing
from tests.rig import (
    ROOM,
    MakeRig,
    cut_off,
    lose,
    unreachable,
)
from tests.unit.delivery.test_attempt import HTML, carry, verdict


async def test_plain_text_does_not_go_into_an_encrypted_room(make: MakeRig) -> None:
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = True
        found = await verdict(rig)
        assert found.kind == "dead"
        assert found.error is not None
        assert (found.error.status, found.error.errcode) == (403, "M_FORBIDDEN")
        assert "FLOWBRIDGE_ENCRYPTED_ROOMS=allow" in found.error.error
        assert rig.rooms.sends == []


async def test_what_was_sent_before_its_room_was_encrypted_is_sent(make: MakeRig) -> None:
    make.tune(plain_seconds=0.0)
    async with make(refuse_encrypted=True) as rig:
        row = rig.pending("a").row
        rig.rooms.then(lose)
        assert (await carry(rig, row) or Verdict("dead")).kind == "again"
        rig.rooms.encrypted[ROOM] = True
        assert await carry(rig, row, 0.0) == Verdict("sent", "$1")
        assert (await verdict(rig, "b", since=0.0)).kind == "dead"
        assert rig.rooms.tries() == ["a"]


async def test_encrypted_room_may_be_allowed(make: MakeRig) -> None:
    async with make() as rig:
        rig.rooms.encrypted[ROOM] = True
        assert (await verdict(rig)).kind == "sent"
        assert rig.rooms.looks == []


@pytest.mark.parametrize(
    ("type_", "state_key"),
    [("m.room.encrypted", None), ("m.room.redaction", None), ("m.reaction", None), ("m.room.topic", "")],
)
async def test_what_is_never_encrypted_or_is_so_already_passes_without_a_look(
    make: MakeRig, type_: str, state_key: str | None
) -> None:
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = True
        assert (await verdict(rig, type_=type_, state_key=state_key)).kind == "sent"
        assert rig.rooms.looks == []


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (HomeserverError("no", errcode="M_FORBIDDEN", status=403), "again"),
        (HomeserverError("no", errcode="M_INVALID_PARAM", status=400), "again"),
        (HomeserverError("no", errcode="M_UNKNOWN", status=404), "again"),
        (HomeserverError("no", errcode="M_UNKNOWN", status=500), "again"),
        (HomeserverError("no", errcode="M_UNRECOGNIZED", status=404), "again"),
        (verdicts.error(HTML), "again"),
        (cut_off(), "again"),
        (unreachable(), "again"),
    ],
)
async def test_room_is_not_plain_because_nobody_can_tell(make: MakeRig, trouble: MatrixError, kind: str) -> None:
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted[ROOM] = trouble
        for _ in range(2):
            assert (await verdict(rig)).kind == kind
        assert rig.rooms.sends == []


async def test_room_is_taken_to_be_plain_for_ten_seconds_at_most(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Timing().plain_seconds <= 10
    async with make(refuse_encrypted=True) as rig:
        for _ in range(3):
            await verdict(rig)
        await verdict(rig, room="!other:hs")
        assert rig.rooms.looks == [("encrypted", ROOM), ("encrypted", "!other:hs")]
        rig.rooms.encrypted[ROOM] = True
        now = time.monotonic()
        monkeypatch.setattr(encryption, "time", Later(now + 9.9))
        assert (await verdict(rig)).kind == "sent"
        monkeypatch.setattr(encryption, "time", Later(now + 10.1))
        assert (await verdict(rig)).kind == "dead"


class Later:
    """Stands in for `time`, at another moment."""

    time = staticmethod(time.time)

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now


async def test_ten_seconds_begin_with_the_question_and_not_with_its_answer(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.tune(plain_seconds=0.05)
    async with make(refuse_encrypted=True) as rig:
        answers = iter([0.06])
        told = rig.rooms.is_encrypted

        async def late(token: str, room_id: str, query: str = "") -> bool:
            found = await told(token, room_id, query)
            await asyncio.sleep(next(answers, 0.0))
            return found

        monkeypatch.setattr(rig.rooms, "is_encrypted", late)
        await verdict(rig)
        await verdict(rig)
        assert len(rig.rooms.looks) == 2


async def test_rooms_known_to_be_plain_are_bounded(make: MakeRig) -> None:
    async with make(refuse_encrypted=True, max_plain=10) as rig:
        for number in range(50):
            await verdict(rig, room=f"!{number}:hs")
        assert len(rig.encryption.plain_until) <= 10
