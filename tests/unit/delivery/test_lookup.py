"""flowbridge.delivery.lookup: an event in doubt is looked for in its room, however busy that is."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowbridge.delivery import lookup
from flowbridge.delivery.attempt import Attempt
from flowbridge.errors import GatewayTimeout, HomeserverError
from flowbridge.homeserver.answers import Verdict
from flowbridge.store import Row
from flowbridge.store.clock import CLOCK_SKEW_MS, now_ms
from tests.rig import ALICE, ROOM, MakeRig, Rig, Rooms, until

LONG_AGO = 20 * 60 + 1
CROWD = 100_000


class Crowded(Rooms):
    """What a filter asks for is found as Synapse does it, or the filter is ignored, or the homeserver looks at one page
    of events only and gives what is left of them ("sparse")."""

    filters = "honoured"
    pages = 0
    most: int | None = None  # pages that are answered

    async def recent(
        self, token: str, room_id: str, before: str, *, only: Any = None, limit: int = 100
    ) -> tuple[list[dict[str, Any]], str]:
        self.pages += 1
        if self.most is not None and self.pages > self.most:
            raise GatewayTimeout("the homeserver did not answer in time")
        if only is None or self.filters == "ignored":
            return await super().recent(token, room_id, before)
        assert set(only) == {"senders", "types"}

        def fits(event: dict[str, Any]) -> bool:
            return event["sender"] in only["senders"] and event["type"] in only["types"]

        newest_first = self.timeline[room_id][::-1]
        start = int(before or 0)
        if self.filters == "sparse":
            shown = [event for event in newest_first[start : start + limit] if fits(event)]
            end = start + limit
        else:
            places = [place for place in range(start, len(newest_first)) if fits(newest_first[place])][:limit]
            shown = [newest_first[place] for place in places]
            end = places[-1] + 1 if places else len(newest_first)
        device = self.users[token]
        public = []
        for event in shown:
            found = {key: value for key, value in event.items() if key != "_txn"}
            if event.get("_txn", (None, None))[0] == device:
                found["unsigned"] = {"transaction_id": event["_txn"][1]}
            public.append(found)
        return public, str(end) if end < len(newest_first) else ""


@pytest.fixture
def crowded() -> Crowded:
    return Crowded()


@pytest.fixture
def make(tmp_path: Path, crowded: Crowded) -> MakeRig:
    return MakeRig(f"sqlite:///{tmp_path}/flowbridge.db", crowded)


def crowd(rooms: Rooms, number: int, at: int | None = None) -> None:
    for event in range(number):
        rooms.put(str(event), sender="@talkative:hs", origin_server_ts=at or now_ms())


async def carry(rig: Rig, row: Row) -> Verdict:
    found = await rig.attempt(Attempt(row, time.time() - LONG_AGO))
    assert found is not None
    return found


def sent(rooms: Rooms, row: Row) -> str:
    """The event is in the room, and nobody has heard of it."""
    return rooms.put("a", _txn=((ALICE.user_id, ALICE.device_id), row.txn_id))


async def cut_off(rig: Rig, rooms: Crowded, row: Row, pages: int = 3) -> Verdict:
    """An attempt during which the homeserver answers no more than these pages."""
    rooms.pages, rooms.most = 0, pages
    verdict = await carry(rig, row)
    rooms.most = None
    return verdict


async def test_event_behind_100_000_newer_ones_is_found_by_one_page(make: MakeRig, crowded: Crowded) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        event_id = sent(crowded, row)
        crowd(crowded, CROWD)
        assert await carry(rig, row) == Verdict("sent", event_id)
        assert crowded.pages == 1
        assert crowded.sends == []


@pytest.mark.parametrize("filters", ["ignored", "sparse"])
@pytest.mark.parametrize("is_there", [True, False])
async def test_look_goes_on_where_the_last_attempt_ended(
    make: MakeRig, crowded: Crowded, filters: str, *, is_there: bool
) -> None:
    """300 pages, and 40 of them an attempt."""
    crowded.filters = filters
    async with make() as rig:
        crowd(crowded, 300, at=now_ms() - 600_000)
        row = rig.pending("a").row
        event_id = sent(crowded, row) if is_there else ""
        crowd(crowded, 30_000)
        attempts = 0
        while (found := await cut_off(rig, crowded, row, 40)).kind == "again":
            attempts += 1
            crowd(crowded, 10)  # which go on meanwhile
            assert attempts < 200, "it begins again each time"
        assert attempts > 1
        assert found.kind == "sent"
        assert crowded.bodies().count("a") == 1
        if is_there:
            assert found.event_id == event_id
        assert len(rig.lookup.places) == 0


class Restarted(Crowded):
    """Knows the places no more that it told before."""

    forgets = False

    async def recent(
        self, token: str, room_id: str, before: str, *, only: Any = None, limit: int = 100
    ) -> tuple[list[dict[str, Any]], str]:
        if self.forgets and before and before.isdigit():
            raise HomeserverError("from: invalid token", errcode="M_INVALID_PARAM", status=400)
        found, end = await super().recent(token, room_id, before.removeprefix("new"), only=only, limit=limit)
        return found, f"new{end}" if self.forgets and end else end


async def test_place_that_the_homeserver_does_not_know_any_more_is_forgotten(tmp_path: Path) -> None:
    rooms = Restarted()
    rooms.filters = "ignored"
    async with Rig(f"sqlite:///{tmp_path}/flowbridge.db", rooms) as rig:
        row = rig.pending("a").row
        event_id = sent(rooms, row)
        crowd(rooms, 5_000)
        await begun(rig, rooms, row)
        rooms.forgets = True
        assert (await carry(rig, row)).kind == "again"
        assert await carry(rig, row) == Verdict("sent", event_id)
        assert rooms.sends == []


async def test_request_that_was_late_is_found_although_the_look_had_begun(make: MakeRig, crowded: Crowded) -> None:
    crowded.filters = "ignored"
    async with make() as rig:
        row = rig.pending("a").row
        crowd(crowded, 5_000)
        await begun(rig, crowded, row)
        event_id = sent(crowded, row)
        crowd(crowded, 150)
        assert await carry(rig, row) == Verdict("sent", event_id)
        assert crowded.sends == []


async def begun(rig: Rig, rooms: Crowded, row: Row) -> None:
    """A look that was cut off on its way back through the room."""
    assert (await cut_off(rig, rooms, row)).kind == "again"
    assert rig.lookup.places[row.delivery].before


async def test_request_that_was_late_is_found_behind_pages_that_are_empty(make: MakeRig, crowded: Crowded) -> None:
    """Others have filled a page since, of which the homeserver shows what is left by the filter: nothing."""
    crowded.filters = "sparse"
    async with make() as rig:
        row = rig.pending("a").row
        crowd(crowded, 5_000)
        await begun(rig, crowded, row)
        event_id = sent(crowded, row)
        crowd(crowded, 150)
        assert await carry(rig, row) == Verdict("sent", event_id)
        assert crowded.sends == []


@pytest.mark.parametrize("by", ["mark", "time"])
async def test_what_came_since_a_look_began_ends_where_it_began(make: MakeRig, crowded: Crowded, by: str) -> None:
    """Empty pages must not be followed to the room's first day, nor through all of a busy minute."""
    crowded.filters = "sparse"
    async with make() as rig:
        looks, row = rig.lookup, rig.pending("a").row
        crowd(crowded, 5_000)
        await begun(rig, crowded, row)
        place = looks.places[row.delivery]
        if by == "time":
            place.mark = None
            for event in crowded.timeline[ROOM]:
                event["origin_server_ts"] -= 2 * CLOCK_SKEW_MS
        crowd(crowded, 250)
        looking = lookup._Search(crowded, row, ALICE.token, ALICE.user_id)
        for most in (2 * 4, 2):  # what has been looked at once is not looked at again
            crowded.pages = 0
            assert await looks._newer(looking, place) is None
            assert crowded.pages <= most
            place.seen_at += 2 * CLOCK_SKEW_MS  # as if it had been that long ago


async def test_equal_events_are_remembered_between_attempts(make: MakeRig, crowded: Crowded) -> None:
    """Before the look ended one was seen that may be it; whether it is shows in the end."""
    crowded.filters = "ignored"
    async with make() as rig:
        row = rig.pending("a").row
        crowd(crowded, 3_000)
        event_id = crowded.put("a")
        assert (await cut_off(rig, crowded, row)).kind == "again"
        assert await carry(rig, row) == Verdict("sent", event_id)


async def test_last_page_may_name_itself_as_the_next(make: MakeRig, crowded: Crowded) -> None:
    async with make() as rig:
        crowded.recent = _standing_still  # type: ignore[method-assign]
        assert (await carry(rig, rig.pending("a").row)).kind == "sent"
        assert len(crowded.sends) == 1


async def _standing_still(*_: Any, **__: Any) -> tuple[list[dict[str, Any]], str]:
    return [], "t0"


async def test_places_are_bounded(make: MakeRig, crowded: Crowded) -> None:
    async with make(max_places=3) as rig:
        for _ in range(6):
            assert (await cut_off(rig, crowded, rig.pending("a").row, 0)).kind == "again"
        assert len(rig.lookup.places) == 3


REDACTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "before version 11": lambda target: {"content": {"reason": "r"}, "redacts": target},
    "from version 11 on": lambda target: {"content": {"reason": "r", "redacts": target}},
}


@pytest.mark.parametrize("version", REDACTIONS)
@pytest.mark.parametrize("target", ["$mine", "$other"])
async def test_redaction_is_told_by_what_it_redacts(make: MakeRig, crowded: Crowded, version: str, target: str) -> None:
    crowded.filters = "ignored"
    async with make() as rig:
        row = rig.pending("", type_="m.room.redaction", content={"redacts": "$mine", "reason": "r"}).row
        event_id = crowded.put("", type="m.room.redaction", **REDACTIONS[version](target))
        found = await carry(rig, row)
        assert (found.event_id == event_id) == (target == "$mine")


async def test_place_is_dropped_when_the_event_is_settled(make: MakeRig, crowded: Crowded) -> None:
    crowded.filters = "ignored"
    async with make() as rig:
        row = rig.pending("a").row
        crowd(crowded, 1_000)
        assert (await cut_off(rig, crowded, row)).kind == "again"
        assert list(rig.lookup.places) == [row.delivery]
        assert (await carry(rig, row)).kind == "sent"
        await until(lambda: not rig.lookup.places)
        assert crowded.bodies(ROOM)[-1] == "a"
