"""flowbridge.delivery.encryption: plain text does not go into encrypted rooms."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from flowbridge.delivery import encryption
from flowbridge.errors import Forbidden, HeldElsewhere, HomeserverError, MatrixError, TooLarge, Unavailable
from flowbridge.homeserver import answers as verdicts
from flowbridge.homeserver.answers import Verdict
from flowbridge.models import Caller, Event
from flowbridge.models.timing import Timing
from tests.rig import (
    ROOM,
    MakeRig,
    Rig,
    cut,
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


# where the bridge encrypts


class Device:
    """Encrypts a body by writing before it how often it has encrypted; each delivery once."""

    def __init__(self) -> None:
        self.sealed: dict[str, bytes] = {}
        self.is_plain = False
        self.is_bot_s: bool | None = True  # None: it is not known
        self.raises: MatrixError | None = None

    def encrypts_for(self, account: str) -> bool:
        if self.is_bot_s is None:
            raise Unavailable("the homeserver has not said yet who the bridge's own account is")
        return self.is_bot_s

    async def encrypt(self, account: str, event: Event, delivery: str) -> bytes | None:
        if self.raises is not None:
            raise self.raises
        if self.is_plain:
            return None
        content = {"body": f"{len(self.sealed)} {json.loads(event.content)['body']}"}
        return self.sealed.setdefault(delivery, json.dumps(content).encode())

    async def made(self, delivery: str) -> bytes | None:
        return self.sealed.get(delivery)

    async def encrypt_for(self, caller: Caller, event: Event, delivery: str) -> bytes:
        if self.raises is not None:
            raise self.raises
        return self.sealed.setdefault(delivery, json.dumps({"body": caller.token}).encode())

    async def permit(self, caller: Caller) -> None:
        if self.raises is not None:
            raise self.raises

    async def is_encrypted(self, room: str) -> bool:
        if self.raises is not None:
            raise self.raises
        return not self.is_plain


@pytest.fixture
async def sealing(make: MakeRig) -> AsyncIterator[tuple[Rig, Device]]:
    async with make(refuse_encrypted=True) as rig:
        device = Device()
        rig.encryption._devices = device
        yield rig, device


async def test_what_is_sent_is_what_it_was_encrypted_to_in_every_try(sealing: tuple[Rig, Device]) -> None:
    rig, _ = sealing
    row = rig.pending("a").row
    rig.rooms.then(cut)
    assert (await carry(rig, row) or Verdict("dead")).kind == "again"
    assert (await carry(rig, row, 0.0) or Verdict("dead")).kind == "sent"
    assert (await verdict(rig, "b")).kind == "sent"
    assert rig.rooms.tries() == ["0 a", "0 a", "1 b"]
    assert {sent.type for sent in rig.rooms.sends} == {"m.room.encrypted"}


async def test_look_up_looks_for_what_it_was_encrypted_to(sealing: tuple[Rig, Device]) -> None:
    """Once the homeserver has forgotten the transaction: the event that is in the room is the encrypted one."""
    rig, _ = sealing
    row = rig.pending("a").row
    rig.rooms.then(lose)
    assert (await carry(rig, row) or Verdict("dead")).kind == "again"
    assert await carry(rig, row, 3_600.0) == Verdict("sent", "$1")
    assert rig.rooms.tries() == ["0 a"]


async def test_room_that_is_plain_is_remembered_until_it_may_have_changed(sealing: tuple[Rig, Device]) -> None:
    rig, device = sealing
    device.is_plain = True
    assert (await verdict(rig, "plain")).kind == "sent"
    device.is_plain = False
    assert (await verdict(rig, "still plain")).kind == "sent"
    rig.encryption.forget([ROOM])
    assert (await verdict(rig, "sealed")).kind == "sent"
    assert rig.rooms.tries() == ["plain", "still plain", "0 sealed"]


async def test_answer_that_a_change_has_overtaken_is_not_remembered(
    sealing: tuple[Rig, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room was plain when it was asked for, and a sync said that it changed before the answer was here."""
    rig, device = sealing

    async def overtaken(account: str, event: Event, delivery: str) -> None:
        rig.encryption.forget([event.room])

    with monkeypatch.context() as patch:
        patch.setattr(device, "encrypt", overtaken)
        assert (await verdict(rig, "plain")).kind == "sent"
    assert (await verdict(rig, "sealed")).kind == "sent"
    assert rig.rooms.tries() == ["plain", "0 sealed"]


async def test_look_that_a_change_has_overtaken_is_not_remembered(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(refuse_encrypted=True) as rig:

        async def overtaken(token: str, room_id: str, query: str = "") -> bool:
            rig.encryption.forget([room_id])
            return False

        with monkeypatch.context() as patch:
            patch.setattr(rig.rooms, "is_encrypted", overtaken)
            assert (await verdict(rig)).kind == "sent"
        rig.rooms.encrypted[ROOM] = True
        assert (await verdict(rig, "b")).kind == "dead"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TooLarge("too large"), "dead"),
        (Forbidden("unknown algorithm"), "dead"),
        (HeldElsewhere("another replica"), "elsewhere"),
        (Unavailable("it starts"), "again"),
        (HomeserverError("no", errcode="M_FORBIDDEN", status=403), "again"),
    ],
)
async def test_what_cannot_be_encrypted_is_never_sent(
    sealing: tuple[Rig, Device], error: MatrixError, kind: str
) -> None:
    rig, device = sealing
    device.raises = error
    assert (await verdict(rig)).kind == kind
    assert rig.rooms.sends == []


# files, which are uploaded before their event is accepted

CALLER = Caller("@bot:hs", "DEVICE", "token")


async def test_file_is_encrypted_for_an_encrypted_room_alone(sealing: tuple[Rig, Device]) -> None:
    rig, device = sealing
    assert await rig.encryption.encrypts_files(CALLER, "!a:hs")
    device.is_plain = True
    assert not await rig.encryption.encrypts_files(CALLER, "!b:hs")


async def test_file_for_a_room_that_nobody_tells_of_is_encrypted(sealing: tuple[Rig, Device]) -> None:
    """The bot is not in there yet; its event waits for an invitation, and the room may be any."""
    rig, device = sealing
    device.raises = Forbidden("not in room")
    assert await rig.encryption.encrypts_files(CALLER, "!a:hs")


async def test_file_waits_until_it_is_known_how_the_room_is(sealing: tuple[Rig, Device]) -> None:
    rig, device = sealing
    device.raises = Unavailable("the homeserver is away")
    with pytest.raises(Unavailable):
        await rig.encryption.encrypts_files(CALLER, "!a:hs")


async def test_where_nobody_encrypts_nothing_is_asked_for_a_file(make: MakeRig) -> None:
    """Its event is refused when its turn comes, as any other: a queued one is a dead letter."""
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted["!a:hs"] = True
        assert not await rig.encryption.encrypts_files(CALLER, "!a:hs")
        assert rig.rooms.looks == []


# callers with tokens of their own


async def test_event_of_a_caller_is_encrypted_with_its_device(sealing: tuple[Rig, Device]) -> None:
    rig, device = sealing
    device.is_bot_s = False
    rig.rooms.encrypted[ROOM] = True
    assert await carry(rig, rig.pending("a").row) == Verdict("sent", "$1")
    assert rig.rooms.sends[0].content == {"body": "alice"}


async def test_event_of_a_caller_without_one_is_refused_with_what_to_do(sealing: tuple[Rig, Device]) -> None:
    rig, device = sealing
    device.is_bot_s, device.raises = False, Forbidden("log in by the bridge")
    rig.rooms.encrypted[ROOM] = True
    found = await verdict(rig)
    assert (found.kind, found.error and found.error.error) == ("dead", "log in by the bridge")
    assert rig.rooms.sends == []
    with pytest.raises(Forbidden, match="log in by the bridge"):
        await rig.encryption.encrypts_files(CALLER, ROOM)


async def test_plain_room_of_a_caller_needs_no_device(sealing: tuple[Rig, Device]) -> None:
    rig, device = sealing
    device.is_bot_s, device.raises = False, Forbidden("log in by the bridge")
    assert (await verdict(rig)).kind == "sent"
    assert not await rig.encryption.encrypts_files(CALLER, ROOM)


async def test_while_nobody_knows_who_the_bot_is_plain_rooms_get_their_events(sealing: tuple[Rig, Device]) -> None:
    """Its token may have ended for good: others' events are none of its business."""
    rig, device = sealing
    device.is_bot_s = None
    assert (await verdict(rig)).kind == "sent"
    assert not await rig.encryption.encrypts_files(CALLER, ROOM)
    rig.encryption.forget([ROOM])
    rig.rooms.encrypted[ROOM] = True
    assert (await verdict(rig, "b")).kind == "again"
    with pytest.raises(Unavailable):
        await rig.encryption.encrypts_files(CALLER, ROOM)
