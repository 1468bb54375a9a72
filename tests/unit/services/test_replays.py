"""flowbridge.services.replays: what sending a state event again would overwrite."""

import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from sqlalchemy import Connection

from flowbridge.auth.callers import Callers
from flowbridge.auth.tokens import Tokens
from flowbridge.errors import BadGateway, GatewayTimeout, MatrixError, Unavailable, WrongState
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer
from flowbridge.models import Caller
from flowbridge.services.readings import Readings
from flowbridge.services.replays import Replays, overwrites

OLD, NEW = {"topic": "old"}, {"topic": "new"}
BOT, ALICE = Caller("@bot:hs", "BRIDGE", "bot", bot=True), Caller("@alice:hs", "PHONE", "alice")


def row(**values: Any) -> dict[str, Any]:
    return {
        "delivery": "a",
        "account": "account",
        "lane": "account|!room:hs",
        "room_id": "!room:hs",
        "event_type": "m.room.topic",
        "state_key": "",
        "content": json.dumps(OLD),
        "state": "sent",
        "event_id": "$old",
        "api_key": "one",
        "accepted_at": 1_000,
        "history": "[]",
        **values,
    }


def event(content: Any = NEW, at: int | None = 2_000) -> dict[str, Any]:
    found = {"event_id": "$new", "sender": "@bob:hs", "content": content}
    return found if at is None else {**found, "origin_server_ts": at}


REPLAYED = json.dumps([{"at": 1, "status": 403}, {"at": 2, "replayed": {"by": "key:one", "accepted_at": 500}}])


@pytest.mark.parametrize(
    ("delivery", "current", "expected"),
    [
        (row(), event(), True),
        (row(), event(at=1), True),
        (row(), event(OLD), False),
        (row(state="dead"), event(at=1_001), True),
        (row(state="dead"), event(at=1_000), False),
        (row(state="dead"), event(OLD, at=1_001), False),
        (row(state="dead"), event(at=None), True),
        (row(state="dead", accepted_at=5_000, history=REPLAYED), event(at=501), True),
        (row(state="dead", accepted_at=5_000, history=REPLAYED), event(at=500), False),
    ],
)
def test_what_was_set_since_is_overwritten(delivery: dict[str, Any], current: dict[str, Any], expected: bool) -> None:
    assert overwrites(delivery, current) is expected


class Store:
    """Says which event is queued."""

    queued: str | None = None

    async def read_last(self, _: Callable[[Connection], object]) -> str | None:
        return self.queued


class World(Homeserver):
    """A homeserver with one answer, a bot, and the tokens that the store holds."""

    def __init__(self, answer: Answer | MatrixError) -> None:
        self.answer = answer
        self.tokens: list[str] = []
        self.known: tuple[str, str, str] | None = None
        self.bot_account: Caller | None = BOT
        self.store = Store()
        self.replays = Replays(cast("Readings", self.store), self, cast("Callers", self), cast("Tokens", self))

    async def read_state(self, token: str, *target: str, any_status: bool = False) -> Answer:
        assert target == ("!room:hs", "m.room.topic", "", "format=event")
        assert any_status
        self.tokens.append(token)
        if isinstance(self.answer, MatrixError):
            raise self.answer
        return self.answer

    @property
    def bot(self) -> "World":
        return self

    async def caller(self) -> Caller | None:
        return self.bot_account

    async def of(self, _: str) -> tuple[str, str, str] | None:
        return self.known


def says(status: int, value: Any) -> Answer:
    return Answer(status, (), json.dumps(value).encode())


async def test_what_the_room_holds_is_shown() -> None:
    with pytest.raises(WrongState) as caught:
        await World(says(200, {**event(), "type": "m.room.topic", "unsigned": {}})).replays.check(row())
    assert caught.value.extra["flowbridge"] == {"current": event()}
    assert "@bob:hs" in caught.value.error


async def test_homeserver_that_answers_the_content_alone_is_understood() -> None:
    with pytest.raises(WrongState) as caught:
        await World(says(200, NEW)).replays.check(row())
    assert caught.value.extra["flowbridge"] == {"current": {"content": NEW}}
    await World(says(200, OLD)).replays.check(row())


async def test_state_that_is_not_there_is_not_overwritten() -> None:
    await World(says(404, {"errcode": "M_NOT_FOUND", "error": "Event not found."})).replays.check(row())


@pytest.mark.parametrize(
    "answer",
    [
        BadGateway("cannot connect"),
        GatewayTimeout("no answer"),
        says(500, {"errcode": "M_UNKNOWN", "error": "Internal server error"}),
        says(429, {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many requests"}),
        Answer(404, ((b"content-type", b"text/html"),), b"<html>a proxy</html>"),
    ],
)
async def test_homeserver_that_cannot_be_asked_is_a_503(answer: Answer | MatrixError) -> None:
    with pytest.raises(Unavailable) as caught:
        await World(answer).replays.check(row())
    assert "Retry-After" in caught.value.headers()
    assert "overwrite=true" in caught.value.error


async def test_state_that_the_account_may_not_see_is_a_409() -> None:
    with pytest.raises(WrongState, match="not in the room"):
        await World(says(403, {"errcode": "M_FORBIDDEN", "error": "You are not in the room"})).replays.check(row())


async def test_newer_state_that_is_still_queued_is_a_409() -> None:
    world = World(says(200, event(OLD)))
    world.store.queued = "newer"
    with pytest.raises(WrongState, match="newer"):
        await world.replays.check(row())
    assert world.tokens == []


async def test_it_is_asked_as_whoever_will_send_it() -> None:
    world = World(says(200, event(OLD)))
    await world.replays.check(row(), ALICE)
    await world.replays.check(row())
    await world.replays.check(row(api_key=None))
    world.known = ("@carol:hs", "PHONE", "carol")
    await world.replays.check(row(api_key=None))
    assert world.tokens == ["alice", "bot", "bot", "carol"]
    world.known = world.bot_account = None
    with pytest.raises(WrongState):
        await world.replays.check(row(api_key=None))
