"""flowbridge.services.invitations: which invitations are taken, in which order, and which are not tried again."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from flowbridge.auth.bot import Bot
from flowbridge.auth.callers import Callers
from flowbridge.errors import BadGateway, MatrixError, TooLarge
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.services.invitations import Invitations, takes
from flowbridge.store import Database
from tests.rig import until

BOT = Caller("@bot:hs", "BRIDGE", "bot", bot=True)
OWN, OTHER = "@alice:hs", "@eve:evil.example"
QUICK = Timing(invitation_seconds=0.001, join_pauses=(0.001, 0.001))


@pytest.mark.parametrize(
    ("auto_join", "inviter", "expected"),
    [
        (("own",), OWN, True),
        (("own",), "@alice:HS", True),
        (("own",), OTHER, False),
        (("own",), "@alice:hs:8448", False),
        (("own",), "@alice:evil.hs", False),
        (("own",), "", False),
        (("own",), "@alice", False),
        (("all",), OTHER, True),
        (("off",), OWN, False),
        ((OTHER,), OTHER, True),
        ((OTHER,), "@mallory:evil.example", False),
        (("evil.example",), OTHER, True),
        (("Evil.example",), OTHER, True),
        (("evil.example",), OWN, False),
        (("own", "evil.example"), OWN, True),
    ],
)
def test_setting_says_whose_invitations_are_taken(auto_join: tuple[str, ...], inviter: str, *, expected: bool) -> None:
    assert takes(auto_join, inviter, BOT.user_id) is expected


class World(Homeserver):
    """A homeserver that keeps invitations, and a bot."""

    def __init__(self) -> None:
        self.read = self.sync
        self.invited: dict[str, str] = {}  # room → inviter
        self.new: list[str] = []  # since the last look
        self.tries: list[str] = []
        self.answers: dict[str, list[Answer | MatrixError]] = {}
        self.hang = asyncio.Event()
        self.hanging: Callable[[str], bool] = lambda _: False
        self.in_flight = Counter[str]()
        self.most = Counter[str]()
        self.looks = 0
        self.joined: list[str] = []
        self.initial: list[MatrixError] = []
        self.is_sqlite = True

    def invite(self, room: str, inviter: str = OWN) -> None:
        self.invited[room] = inviter
        self.new.append(room)

    async def sync(self, target: str, **_: object) -> tuple[bytes, Any]:
        self.looks += 1
        query = parse_qs(urlsplit(target).query)
        is_first, rooms = "since" not in query, json.loads(query["filter"][0])["room"].get("rooms")
        if is_first and self.initial and rooms is None:
            raise self.initial.pop(0)
        shown = [] if rooms == [] else list(self.invited) if is_first else self.new
        self.new = []
        found = {}
        for room in shown:
            if room in self.invited:
                event = {"type": "m.room.member", "state_key": BOT.user_id, "sender": self.invited[room]}
                found[room] = {"invite_state": {"events": [{**event, "content": {"membership": "invite"}}]}}
        value = {"next_batch": str(self.looks), "rooms": {"invite": found}}
        return json.dumps(value).encode(), value

    async def call(self, method: str, target: str, **_: object) -> Answer:
        room = unquote(target.rpartition("/")[2])
        inviter = self.invited.get(room, "")
        self.tries.append(room)
        self.in_flight[inviter] += 1
        self.most[inviter] = max(self.most[inviter], self.in_flight[inviter])
        self.most["all"] = max(self.most["all"], self.in_flight.total())
        try:
            if self.hanging(room):
                await self.hang.wait()
            if answers := self.answers.get(room):
                answer = answers.pop(0)
                if isinstance(answer, MatrixError):
                    raise answer
                return answer
            self.invited.pop(room, None)
            return says(200, {"room_id": room})
        finally:
            self.in_flight[inviter] -= 1

    async def caller(self) -> Caller | None:
        return BOT

    @contextlib.contextmanager
    def as_(self, _: Caller) -> Any:
        yield

    async def told(self, user_id: str, room_id: str) -> None:
        assert user_id == BOT.user_id
        self.joined.append(room_id)

    @contextlib.asynccontextmanager
    async def running(self, auto_join: str = "all", *, timing: Timing = QUICK, **how: Any) -> AsyncIterator[None]:
        invitations = Invitations(
            (auto_join,),
            cast("Bot", self),
            cast("Callers", self),
            self,
            cast("Database", self),
            joined=self.told,
            timing=timing,
            **how,
        )
        task = asyncio.create_task(invitations.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def looked(self, times: int = 3) -> None:
        """Until it has looked so many times more."""
        before = self.looks
        await until(lambda: self.looks >= before + times)


@pytest.fixture
async def world() -> World:
    return World()


def says(status: int, value: Any) -> Answer:
    return Answer(status, (), json.dumps(value).encode())


def refuses(status: int, errcode: str, **more: Any) -> Answer:
    return says(status, {"errcode": errcode, "error": "no", **more})


async def test_invitations_from_before_and_new_ones_are_taken_and_the_joins_told(world: World) -> None:
    world.invite("!before:hs")
    async with world.running():
        await until(lambda: world.joined == ["!before:hs"])
        world.invite("!new:hs")
        await until(lambda: world.joined == ["!before:hs", "!new:hs"])
        await world.looked()
    assert world.tries == ["!before:hs", "!new:hs"]


async def test_those_that_are_not_taken_have_a_line_each(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flowbridge")
    world.invite("!a:hs", OTHER)
    async with world.running("own"):
        await world.looked()
    assert world.tries == []
    assert caplog.text.count("invitation_left") == 1


async def test_flood_that_is_not_taken_does_not_flood_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flowbridge")
    for number in range(1_000):
        world.invite(f"!{number}:hs", OTHER)
    async with world.running("own"):
        await world.looked()
    assert caplog.text.count("invitation_left") == 100
    assert caplog.text.count("invitations_left") == 1


async def test_flood_of_one_inviter_holds_up_nobody_else(world: World) -> None:
    """10,000 of a server that never answers: they take one place, and the next of the own server comes at once."""
    for number in range(10_000):
        world.invite(f"!evil{number}:evil.example", OTHER)
    world.hanging = lambda room: "evil" in room
    async with world.running():
        await until(lambda: world.most[OTHER])
        for number in range(3):
            world.invite(f"!{number}:hs", f"@user{number}:hs")
        await until(lambda: len(world.joined) == 3)
        assert world.most == {OTHER: 1, **{f"@user{number}:hs": 1 for number in range(3)}, "all": world.most["all"]}


async def test_few_joins_are_in_flight_at_once(world: World) -> None:
    for number in range(100):
        world.invite(f"!{number}:hs", f"@user{number}:server{number}.example")
        world.invite(f"!own{number}:hs", f"@user{number}:hs")
    world.hanging = lambda _: True
    async with world.running():
        await until(lambda: world.in_flight.total() == 6)
        await world.looked()
        assert world.most["all"] == 6
        world.hang.set()


async def test_all_of_a_flood_are_taken_in_the_end(world: World) -> None:
    """More than are remembered at once: the homeserver has the others."""
    for number in range(300):
        world.invite(f"!{number}:hs", f"@user{number % 3}:hs")
    async with world.running(max_invitations=100):
        await until(lambda: len(world.joined) == 300)
    assert len(world.tries) == 300


@pytest.mark.parametrize("answer", [refuses(403, "M_FORBIDDEN"), refuses(404, "M_UNKNOWN"), refuses(400, "M_UNKNOWN")])
async def test_refused_join_is_not_tried_again_but_for_another_invitation(world: World, answer: Answer) -> None:
    world.answers["!a:hs"] = [answer]
    world.invite("!a:hs")
    async with world.running():
        await until(lambda: world.tries)
        await world.looked()
        assert world.tries == ["!a:hs"]
        world.invite("!a:hs")
        await until(lambda: world.joined == ["!a:hs"])
    assert world.tries == ["!a:hs"] * 2


async def test_failed_join_is_tried_again_a_few_times(world: World, caplog: pytest.LogCaptureFixture) -> None:
    failures: list[Answer | MatrixError] = [refuses(502, "M_UNKNOWN"), BadGateway("away"), refuses(500, "M_UNKNOWN")]
    world.answers = {"!a:hs": failures[:2], "!b:hs": [*failures, *failures]}
    world.invite("!a:hs")
    world.invite("!b:hs", "@bob:hs")
    async with world.running():
        await until(lambda: world.joined == ["!a:hs"] and len(world.tries) == 6)
        await world.looked()
    assert Counter(world.tries) == {"!a:hs": 3, "!b:hs": 3}
    assert caplog.text.count("invitation_failed") == 5


async def test_rate_limit_of_the_homeserver_holds_all_joins(world: World) -> None:
    world.answers["!a:hs"] = [refuses(429, "M_LIMIT_EXCEEDED", retry_after_ms=200)]
    world.invite("!a:hs")
    async with world.running():
        began = asyncio.get_running_loop().time()
        await until(lambda: world.tries == ["!a:hs"])
        world.invite("!b:hs", "@bob:hs")
        await until(lambda: sorted(world.joined) == ["!a:hs", "!b:hs"])
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_homeserver_that_is_away_is_asked_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.initial = [BadGateway("away"), BadGateway("away")]
    world.invite("!a:hs")
    async with world.running():
        await until(lambda: world.joined == ["!a:hs"])
    assert caplog.text.count("invitations_unknown") == 1


async def test_too_many_invitations_to_read_hide_no_new_one(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.initial = [TooLarge("64 MiB")]
    world.invite("!old:hs")
    async with world.running():
        await until(lambda: world.looks >= 3)
        world.invite("!new:hs")
        await until(lambda: world.joined == ["!new:hs"])
    assert caplog.text.count("invitations_unreadable") == 1
