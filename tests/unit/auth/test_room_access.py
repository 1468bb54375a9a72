"""flowbridge.auth.room_access: where an alias leads, who joins it, and which key is for it."""

import asyncio
from functools import partial

import pytest

from flowbridge.auth import scopes
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.identities import RETRY_SECONDS
from flowbridge.auth.room_access import JOINED_SECONDS, RoomAccess
from flowbridge.errors import BadGateway, Forbidden, HomeserverError, MatrixError
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from tests.unit import Clock
from tests.unit.auth.test_callers import NO_NAMES, make

ROOM, OTHER = "!a:hs", "!b:hs"
ALIAS, SECOND, ELSEWHERE, NOWHERE = "#flow:hs", "#second:hs", "#elsewhere:hs", "#nowhere:hs"
ALICE = Credential("alice")
TYPE = "m.room.message"

pytestmark = pytest.mark.usefixtures("nothing_set")


class FakeHomeserver:
    """A room directory; `refusal` is what it says of aliases."""

    def __init__(self) -> None:
        self.directory = {ALIAS: ROOM, SECOND: ROOM, ELSEWHERE: OTHER}
        self.joins: list[tuple[str, str]] = []
        self.looks: list[str] = []
        self.refusal: MatrixError | None = None

    async def whoami(self, token: str) -> tuple[str, str | None]:
        return f"@{token}:hs", None

    async def join(self, token: str, alias: str) -> str:
        self.joins.append((token, alias))
        return await self._lead(alias)

    async def resolve(self, token: str, alias: str) -> str:
        self.looks.append(alias)
        return await self._lead(alias)

    async def _lead(self, alias: str) -> str:
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        if alias not in self.directory:
            raise HomeserverError("no such alias", errcode="M_NOT_FOUND", status=404)
        return self.directory[alias]


@pytest.fixture
def homeserver() -> FakeHomeserver:
    return FakeHomeserver()


@pytest.fixture
def callers(homeserver: FakeHomeserver) -> Callers:
    return make(homeserver, access_token="bot")  # type: ignore[arg-type]


@pytest.fixture
def known(callers: Callers, homeserver: FakeHomeserver, clock: Clock) -> RoomAccess:
    return RoomAccess(callers, homeserver, NO_NAMES, timing=Timing(clock=clock))  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def with_key(*rooms: str, event_types: tuple[str, ...] = ()) -> Credential:
    return Credential(None, ApiKey("k", rooms=rooms, event_types=event_types))


@pytest.fixture
def enter(known: RoomAccess) -> "Enter":
    return Enter(known)


class Enter:
    """`await enter(credential, room)`: the id of the room for a message."""

    def __init__(self, known: RoomAccess) -> None:
        self._known = known

    async def __call__(self, credential: Credential = ALICE, room: str = ALIAS, *, joins: bool = True) -> str:
        permit = partial(scopes.permit, credential.key, TYPE)
        caller, room_id = await self._known.enter(credential, room, permit, joins=joins)
        assert caller.user_id == f"@{credential.token or 'bot'}:hs"
        return room_id


async def test_alias_is_joined_once_and_kept_for_10_minutes(
    enter: Enter, homeserver: FakeHomeserver, clock: Clock
) -> None:
    assert await enter() == ROOM
    clock.now += 599
    homeserver.directory[ALIAS] = OTHER
    assert await enter() == ROOM
    assert homeserver.joins == [("alice", ALIAS)]
    clock.now += 2
    assert await enter() == OTHER
    assert len(homeserver.joins) == 2
    assert homeserver.looks == []


async def test_alias_is_joined_by_each_caller_once(enter: Enter, homeserver: FakeHomeserver) -> None:
    for token in ("alice", "bob", "alice", "bob"):
        await enter(Credential(token))
    assert homeserver.joins == [("alice", ALIAS), ("bob", ALIAS)]


async def test_50_concurrent_callers_of_an_alias_join_once(enter: Enter, homeserver: FakeHomeserver) -> None:
    assert set(await asyncio.gather(*(enter() for _ in range(50)))) == {ROOM}
    assert len(homeserver.joins) == 1


async def test_who_reads_joins_nothing_and_is_told_of_today(enter: Enter, homeserver: FakeHomeserver) -> None:
    assert await enter(joins=False) == ROOM
    homeserver.directory[ALIAS] = OTHER
    assert await enter(joins=False) == OTHER
    assert homeserver.joins == []


async def test_alias_that_could_not_be_joined_is_asked_for_again(enter: Enter, homeserver: FakeHomeserver) -> None:
    with pytest.raises(HomeserverError):
        await enter(room=NOWHERE)
    homeserver.directory[NOWHERE] = ROOM
    assert await enter(room=NOWHERE) == ROOM
    assert len(homeserver.joins) == 2


async def test_known_alias_is_good_while_the_homeserver_is_away(
    enter: Enter, homeserver: FakeHomeserver, clock: Clock
) -> None:
    await enter()
    homeserver.refusal = BadGateway("away")
    clock.now += 601
    assert await enter() == ROOM
    with pytest.raises(BadGateway):
        await enter(Credential("bob"))


async def test_refused_token_is_asked_for_again(enter: Enter, homeserver: FakeHomeserver) -> None:
    homeserver.refusal = HomeserverError("Unknown", errcode="M_UNKNOWN_TOKEN", status=401)
    with pytest.raises(HomeserverError):
        await enter()
    with pytest.raises(BadGateway, match="own account"):
        await enter(with_key())


async def test_oldest_alias_makes_room_for_a_new_one(callers: Callers, homeserver: FakeHomeserver) -> None:
    enter = Enter(RoomAccess(callers, homeserver, NO_NAMES, max_known=1))  # type: ignore[arg-type]
    for token in ("alice", "bob", "alice"):
        await enter(Credential(token))
    assert len(homeserver.joins) == 3


# keys


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize(
    ("scope", "room"),
    [
        ((ROOM,), ROOM),
        ((ALIAS,), ALIAS),
        ((ROOM,), ALIAS),
        ((ALIAS,), ROOM),
        ((ALIAS,), SECOND),
        ((OTHER, NOWHERE, ELSEWHERE, ALIAS), ROOM),
        ((), ALIAS),
    ],
)
async def test_key_is_for_a_room_by_all_its_names(
    enter: Enter, homeserver: FakeHomeserver, scope: tuple[str, ...], room: str, *, joins: bool
) -> None:
    assert await enter(with_key(*scope), room, joins=joins) == ROOM
    assert homeserver.joins == ([("bot", room)] if joins and room != ROOM else [])


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize(
    ("scope", "room"),
    [
        ((OTHER,), ROOM),
        ((OTHER,), ALIAS),
        ((ELSEWHERE,), ROOM),
        ((ELSEWHERE,), ALIAS),
        ((NOWHERE,), ROOM),
        ((NOWHERE, OTHER), ALIAS),
    ],
)
async def test_key_of_another_room_joins_nothing(
    enter: Enter, homeserver: FakeHomeserver, scope: tuple[str, ...], room: str, *, joins: bool
) -> None:
    with pytest.raises(Forbidden):
        await enter(with_key(*scope), room, joins=joins)
    assert homeserver.joins == []


async def test_event_type_binds_under_every_name(enter: Enter, homeserver: FakeHomeserver) -> None:
    for scope, room in (((ROOM,), ALIAS), ((ALIAS,), ROOM), ((ALIAS,), ALIAS)):
        with pytest.raises(Forbidden):
            await enter(with_key(*scope, event_types=("m.reaction",)), room)
    assert homeserver.joins == []


async def test_homeserver_is_not_asked_when_the_scope_names_the_room_as_the_request_does(
    enter: Enter, homeserver: FakeHomeserver
) -> None:
    assert await enter(with_key(ALIAS), ALIAS) == ROOM
    homeserver.refusal = BadGateway("away")
    assert await enter(with_key(ROOM, ALIAS), ROOM) == ROOM
    with pytest.raises(Forbidden):  # ids differ, whatever the homeserver says
        await enter(with_key(OTHER), ROOM)
    assert homeserver.looks == []


async def test_look_is_good_for_a_minute_and_while_the_homeserver_is_away(
    enter: Enter, homeserver: FakeHomeserver, clock: Clock
) -> None:
    for _ in range(3):
        assert await enter(with_key(ALIAS), ROOM) == ROOM
    assert homeserver.looks == [ALIAS]
    homeserver.refusal = BadGateway("away")
    clock.now += 61
    assert await enter(with_key(ALIAS), ROOM) == ROOM
    homeserver.refusal = None
    homeserver.directory[ALIAS] = OTHER
    clock.now += 61
    with pytest.raises(Forbidden):
        await enter(with_key(ALIAS), ROOM)


@pytest.mark.parametrize(
    "trouble",
    [BadGateway("away"), HomeserverError("slower", errcode="M_LIMIT_EXCEEDED", status=429)],
)
async def test_key_is_not_refused_for_good_when_nobody_can_say(
    enter: Enter, homeserver: FakeHomeserver, trouble: MatrixError
) -> None:
    homeserver.refusal = trouble
    with pytest.raises(type(trouble)):
        await enter(with_key(ALIAS), ROOM)


async def test_moved_alias_takes_no_key_into_a_room_that_it_is_not_for(
    enter: Enter, homeserver: FakeHomeserver, clock: Clock
) -> None:
    assert await enter(with_key(ROOM), ALIAS) == ROOM
    homeserver.directory[ALIAS] = OTHER
    clock.now += 61  # looked up anew; as joined it is remembered for longer
    with pytest.raises(Forbidden):
        await enter(with_key(ROOM), ALIAS)
    with pytest.raises(Forbidden):
        await enter(with_key(OTHER), ALIAS)
    clock.now += 600
    assert await enter(with_key(OTHER), ALIAS) == OTHER


async def test_scope_is_the_rooms_that_its_names_lead_to(
    known: RoomAccess, callers: Callers, homeserver: FakeHomeserver
) -> None:
    key = ApiKey("k", rooms=(ALIAS, NOWHERE, OTHER))
    caller = await callers.identify(Credential(None, key))
    assert await known.scope(caller, key) == {ROOM, OTHER}
    assert homeserver.joins == []
    assert await known.scope(caller, key, joins=True) == {ROOM, OTHER}
    assert homeserver.joins == [("bot", ALIAS), ("bot", NOWHERE)]


class FakeNames:
    """What the homeserver has said to an earlier process."""

    def __init__(self) -> None:
        self.values = {f"joined|@alice:hs|{ALIAS}": "!old:hs"}

    async def find(self, name: str) -> str | None:
        return self.values.get(name)

    def note(self, name: str, value: str) -> None:
        self.values[name] = value

    def forget(self, name: str) -> None:
        self.values.pop(name, None)


class SlowHomeserver(FakeHomeserver):
    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def _lead(self, alias: str) -> str:
        await self.go.wait()
        return await super()._lead(alias)


@pytest.fixture
def slow(callers: Callers, clock: Clock) -> tuple[RoomAccess, SlowHomeserver, FakeNames]:
    homeserver, names, timing = SlowHomeserver(), FakeNames(), Timing(patience_seconds=0.0, clock=clock)
    return RoomAccess(callers, homeserver, names, timing=timing), homeserver, names  # type: ignore[arg-type]


async def test_older_answer_counts_until_the_homeserver_has_answered(
    slow: tuple[RoomAccess, SlowHomeserver, FakeNames], callers: Callers
) -> None:
    known, homeserver, names = slow
    enter = Enter(known)
    assert [await enter(ALICE, ALIAS) for _ in range(3)] == ["!old:hs"] * 3
    homeserver.go.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert await enter(ALICE, ALIAS) == ROOM
    assert list(names.values.values()) == [ROOM]
    assert homeserver.joins == [("alice", ALIAS)]


async def test_homeserver_that_hangs_is_asked_once(
    slow: tuple[RoomAccess, SlowHomeserver, FakeNames], callers: Callers, clock: Clock
) -> None:
    known, homeserver, _ = slow
    enter = Enter(known)
    for _ in range(5):
        assert await enter(ALICE, ALIAS) == "!old:hs"
        clock.now += RETRY_SECONDS + 1
    assert homeserver.joins == [("alice", ALIAS)]
    homeserver.go.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert await enter(ALICE, ALIAS) == ROOM
    clock.now += JOINED_SECONDS - 1
    assert await enter(ALICE, ALIAS) == ROOM
    assert len(homeserver.joins) == 1


async def test_moved_alias_does_not_lead_where_the_store_says(
    slow: tuple[RoomAccess, SlowHomeserver, FakeNames], callers: Callers
) -> None:
    known, homeserver, names = slow
    enter = Enter(known)
    caller = await callers.identify(ALICE)
    assert await enter(ALICE, ALIAS) == "!old:hs"
    moving = asyncio.ensure_future(known.moved(caller, ALIAS, "!old:hs"))
    homeserver.go.set()
    assert await moving
    homeserver.go.clear()
    assert list(names.values.values()) in ([], [ROOM])
    entering = asyncio.ensure_future(enter(ALICE, ALIAS))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not entering.done(), "it waits for the homeserver"
    homeserver.go.set()
    assert await entering == ROOM


async def test_answer_from_before_a_move_does_not_count_after_it(
    slow: tuple[RoomAccess, SlowHomeserver, FakeNames], callers: Callers
) -> None:
    known, homeserver, names = slow
    enter = Enter(known)
    caller = await callers.identify(ALICE)
    homeserver.directory[ALIAS] = OTHER
    assert await enter(ALICE, ALIAS) == "!old:hs"
    known.forget(caller, ALIAS)
    homeserver.go.set()
    for _ in range(5):
        await asyncio.sleep(0)  # the answer to the first question comes
    homeserver.directory[ALIAS] = ROOM
    assert await enter(ALICE, ALIAS) == ROOM
    assert list(names.values.values()) == [ROOM]
