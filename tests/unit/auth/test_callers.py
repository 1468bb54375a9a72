"""flowbridge.auth.callers: who may call, and how seldom the homeserver is asked."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from flowbridge.auth.api_keys import ApiKeys
from flowbridge.auth.bot import Bot
from flowbridge.auth.bot_token import device_id
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.identities import MAX_RENEWING, Identities, Identity
from flowbridge.auth.names import Names
from flowbridge.auth.refusals import Refusals
from flowbridge.errors import (
    BadGateway,
    BadRequest,
    GatewayTimeout,
    HomeserverError,
    MatrixError,
    Unauthorized,
    Unavailable,
)
from flowbridge.homeserver import Homeserver
from flowbridge.models import ApiKey, Caller
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database, StoreUnavailable
from tests.patience import PATIENCE
from tests.unit import Clock

KEY = "fb_key-of-32-characters-and-some-more"
FIXED = ApiKey("fixed-eadf45ba", admin=True)  # KEY, by its SHA-256
ALICE = ("@alice:hs", "DEVICE")
NO_NAMES = Names(Database("sqlite:///nowhere.db"))

pytestmark = pytest.mark.usefixtures("nothing_set")


class FakeHomeserver:
    """Knows some tokens; `gate` holds its answers back, `broken` makes every call fail."""

    def __init__(self, **accounts: str) -> None:
        self.accounts = dict(accounts)
        self.asked: list[str] = []
        self.logins: list[tuple[str, str, str]] = []
        self.arrivals: asyncio.Queue[str] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken: MatrixError | None = None

    async def whoami(self, token: str) -> tuple[str, str | None]:
        self.asked.append(token)
        self.arrivals.put_nowait(token)
        await self.gate.wait()
        if self.broken:
            raise self.broken
        if token not in self.accounts:
            raise unknown_token()
        return self.accounts[token], "DEVICE"

    async def login(self, user: str, password: str, device_id: str) -> str:
        self.logins.append((user, password, device_id))
        self.arrivals.put_nowait(user)
        await self.gate.wait()
        if self.broken:
            raise self.broken
        token = f"login{len(self.logins)}"
        self.accounts[token] = f"@{user}:hs"
        return token


def unknown_token() -> MatrixError:
    return HomeserverError("Unrecognised access token", errcode="M_UNKNOWN_TOKEN", status=401, soft_logout=False)


class Memory:
    """The store's memory of tokens; `gate` holds it back, `broken` makes it fail."""

    def __init__(self, **identities: Identity) -> None:
        self.identities = identities
        self.asked: list[str] = []
        self.arrivals: asyncio.Queue[str] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken: Unavailable | None = None

    async def seen(self, token: str) -> Identity | None:
        self.asked.append(token)
        self.arrivals.put_nowait(token)
        await self.gate.wait()
        if self.broken:
            raise self.broken
        return self.identities.get(token)


def make(
    homeserver: FakeHomeserver | None = None,
    memory: Memory | None = None,
    *,
    names: Names = NO_NAMES,
    clock: Callable[[], float] = time.monotonic,
    timing: Timing = Timing(),
    max_kept: int = 100,
    on_revoked: Callable[[str], object] = lambda _: None,
    **values: Any,
) -> Callers:
    settings, found = Settings.load(**values), cast("Homeserver", homeserver or FakeHomeserver())
    timing = replace(timing, clock=clock)
    refusals = Refusals(settings.wrong_keys_per_minute, timing=timing)
    identities = Identities(
        found,
        (memory or Memory()).seen,
        refusals,
        on_revoked=on_revoked,
        timing=timing,
        max_kept=max_kept,
    )
    keys = ApiKeys(settings, Database("sqlite:///nowhere.db"), timing=timing)
    return Callers(identities, keys, Bot(settings, found, identities, names, timing=timing), refusals)


async def until(condition: Callable[[], bool]) -> None:
    """Let the others work until this holds."""
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come to that")


@pytest.fixture
def clock() -> Clock:
    return Clock()


# what a request brought


@pytest.mark.parametrize(
    ("headers", "query", "token"),
    [
        ({"authorization": "Bearer syt_a"}, b"", "syt_a"),
        ({"authorization": "bearer  syt_a "}, b"", "syt_a"),
        ({}, b"access_token=syt_a", "syt_a"),
        ({}, b"limit=5&access_token=syt%5Fa&access_token=second", "syt_a"),
        ({"authorization": "Bearer header"}, b"access_token=query", "header"),
        ({"authorization": "Basic dXNlcjpwdw=="}, b"access_token=query", "query"),
        ({"x-api-key": "", "authorization": "Bearer syt_a"}, b"", "syt_a"),
    ],
)
async def test_token_is_taken_from_header_or_query(headers: dict[str, str], query: bytes, token: str) -> None:
    assert await make().credential(headers, query) == Credential(token)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"x-api-key": KEY}, b""),
        ({"authorization": f"Bearer {KEY}"}, b""),
        ({"x-api-key": KEY, "authorization": "Bearer syt_a"}, b"access_token=syt_b"),
    ],
)
async def test_right_key_is_the_bot(headers: dict[str, str], query: bytes) -> None:
    bridge = make(api_keys=f"fb_other{KEY},{KEY}", access_token="bot")
    assert await bridge.credential(headers, query) == Credential(None, FIXED)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({}, b""),
        ({}, b"access_token="),
        ({}, b"other=1"),
        ({"authorization": "Bearer"}, b""),
        ({"authorization": "Bearer   "}, b""),
        ({"authorization": "Basic dXNlcjpwdw=="}, b""),
        ({"x-api-key": ""}, b""),
    ],
)
async def test_neither_token_nor_key_is_a_missing_token(headers: dict[str, str], query: bytes) -> None:
    with pytest.raises(Unauthorized) as caught:
        await make(api_keys=KEY, access_token="bot").credential(headers, query)
    assert (caught.value.status, caught.value.errcode) == (401, "M_MISSING_TOKEN")


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"authorization": "Bearer t\xf6ken"}, b""),
        ({"authorization": "Bearer two words"}, b""),
        ({"authorization": "Bearer a\x00b"}, b""),
        ({"authorization": "Bearer " + "x" * 4_097}, b""),
        ({}, b"access_token=%00"),
        ({}, b"access_token=%ff"),
        ({}, b"access_token=\xff"),
        ({}, b"access_token=a+b"),
        ({}, b"access_token=%F0%9F%98%80"),
        ({}, b"access_token=a%0d%0aX-Evil:1"),
    ],
)
async def test_token_that_can_be_none_is_refused_here(headers: dict[str, str], query: bytes) -> None:
    with pytest.raises(Unauthorized) as caught:
        await make().credential(headers, query)
    assert caught.value.errcode == "M_UNKNOWN_TOKEN"


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"x-api-key": KEY, "authorization": "Bearer fb_other"}, b""),
        ({"x-api-key": KEY}, b"access_token=fb_other"),
        ({"authorization": f"Bearer {KEY}"}, b"access_token=fb_other"),
        ({}, f"access_token={KEY}&access_token=fb_other".encode()),
    ],
)
async def test_two_different_api_keys_are_refused_and_not_repeated(headers: dict[str, str], query: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        await make(api_keys=KEY, access_token="bot").credential(headers, query)
    assert "fb_" not in caught.value.error


async def test_same_api_key_twice_is_one() -> None:
    bridge = make(api_keys=KEY, access_token="bot")
    headers = {"x-api-key": KEY, "authorization": f"Bearer {KEY}"}
    assert await bridge.credential(headers, f"access_token={KEY}".encode()) == Credential(None, FIXED)


@pytest.mark.parametrize(
    "key", ["fb_wrong", "fb_", KEY[:-1], f"{KEY}y", KEY.upper(), "fb_k\xe9y", "unprefixed", "fb_\xff"]
)
async def test_wrong_key_is_refused_and_not_repeated(key: str) -> None:
    for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
        if "authorization" in headers and not key.startswith("fb_"):
            continue  # a token
        with pytest.raises(Unauthorized) as caught:
            await make(api_keys=KEY, access_token="bot").credential(headers, b"")
        assert caught.value.errcode == "M_UNKNOWN_TOKEN"
        assert key == "fb_" or key not in caught.value.error


async def test_wrong_key_is_not_helped_by_a_right_token() -> None:
    with pytest.raises(Unauthorized):
        await make(api_keys=KEY).credential({"x-api-key": "fb_wrong", "authorization": "Bearer syt_a"}, b"")


async def test_key_without_a_bot_names_the_setting() -> None:
    with pytest.raises(Unauthorized, match="ACCESS_TOKEN"):
        await make(api_keys=KEY).credential({"x-api-key": KEY}, b"")
    with pytest.raises(Unauthorized) as caught:
        await make(api_keys=KEY).credential({"x-api-key": "fb_wrong"}, b"")
    assert "ACCESS_TOKEN" not in caught.value.error


# whose token it is


async def test_token_is_its_account() -> None:
    bridge = make(FakeHomeserver(syt_a="@alice:hs"))
    assert await bridge.identify(Credential("syt_a")) == Caller("@alice:hs", "DEVICE", "syt_a", bot=False)


async def test_50_concurrent_callers_ask_once_a_token() -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs", syt_b="@bob:hs")
    homeserver.gate.clear()
    bridge = make(homeserver)
    waiting = asyncio.gather(*(bridge.identify(Credential(f"syt_{'ab'[i % 2]}")) for i in range(50)))
    assert {await homeserver.arrivals.get(), await homeserver.arrivals.get()} == {"syt_a", "syt_b"}
    homeserver.gate.set()
    assert [caller.user_id for caller in await waiting] == ["@alice:hs", "@bob:hs"] * 25
    assert sorted(homeserver.asked) == ["syt_a", "syt_b"]


async def test_caller_who_leaves_does_not_end_the_question_for_others() -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    homeserver.gate.clear()
    bridge = make(homeserver)
    first, second = (asyncio.create_task(bridge.identify(Credential("syt_a"))) for _ in range(2))
    await homeserver.arrivals.get()
    first.cancel()
    homeserver.gate.set()
    assert (await second).user_id == "@alice:hs"
    assert len(homeserver.asked) == 1


async def test_answer_is_kept_for_10_minutes(clock: Clock) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver, clock=clock)
    await bridge.identify(Credential("syt_a"))
    clock.now += 599
    await bridge.identify(Credential("syt_a"))
    assert len(homeserver.asked) == 1
    clock.now += 2
    await bridge.identify(Credential("syt_a"))
    await until(lambda: len(homeserver.asked) == 2)


async def test_old_answer_is_good_while_the_homeserver_hangs_and_is_asked_once(clock: Clock) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver, clock=clock, timing=Timing(patience_seconds=2 * PATIENCE))
    await bridge.identify(Credential("syt_a"))
    homeserver.gate.clear()
    for seconds in (601, 3_600, 6, 6, 6):
        clock.now += seconds
        async with asyncio.timeout(PATIENCE):
            assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs"
    await until(lambda: homeserver.arrivals.qsize() == 2)
    homeserver.gate.set()
    await bridge.identities.idle()
    clock.now += 599
    await bridge.identify(Credential("syt_a"))
    assert homeserver.asked == ["syt_a"] * 2


async def test_old_answer_is_asked_anew_every_5_s_while_the_homeserver_is_away(clock: Clock) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver, clock=clock)
    await bridge.identify(Credential("syt_a"))
    homeserver.broken = BadGateway("away")
    clock.now += 601
    for asked in (2, 2, 3, 3, 4):
        assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs"
        await bridge.identities.idle()
        assert len(homeserver.asked) == asked
        clock.now += 2.6
    homeserver.broken = None


async def test_old_answer_goes_with_a_401(clock: Clock) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver, clock=clock)
    await bridge.identify(Credential("syt_a"))
    homeserver.accounts.clear()
    clock.now += 601
    await bridge.identify(Credential("syt_a"))
    await bridge.identities.idle()
    with pytest.raises(HomeserverError) as caught:
        await bridge.identify(Credential("syt_a"))
    assert caught.value.status == 401


async def test_token_that_the_homeserver_serves_is_asked_of_once() -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver)
    for _ in range(50):
        bridge.identities.meet("syt_a")
    await bridge.identities.idle()
    assert bridge.identities.known("syt_a")
    for _ in range(50):
        bridge.identities.meet("syt_a")
    await bridge.identities.idle()
    assert homeserver.asked == ["syt_a"]


async def test_homeserver_that_cannot_say_whose_a_token_is_is_asked_every_5_s(clock: Clock) -> None:
    homeserver = FakeHomeserver()
    homeserver.broken = BadGateway("away")
    bridge = make(homeserver, clock=clock)
    for asked in (1, 1, 2, 2, 3):
        for token in ("syt_a", "syt_b"):
            bridge.identities.meet(token)
            await bridge.identities.idle()
        assert len(homeserver.asked) == asked
        clock.now += 2.6


async def test_token_that_is_wrong_keeps_no_other_from_being_learnt() -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver)
    for token in ("wrong", "syt_a"):
        bridge.identities.meet(token)
        await bridge.identities.idle()
    assert homeserver.asked == ["wrong", "syt_a"]
    assert bridge.identities.known("syt_a")
    assert not bridge.identities.known("wrong")


async def test_few_tokens_are_learnt_at_once() -> None:
    homeserver = FakeHomeserver()
    homeserver.gate.clear()
    bridge = make(homeserver)
    for number in range(50):
        bridge.identities.meet(f"syt_{number}")
    await until(lambda: len(homeserver.asked) == MAX_RENEWING)
    homeserver.gate.set()
    await bridge.identities.idle()
    assert len(homeserver.asked) == MAX_RENEWING


async def test_few_old_answers_are_asked_anew_at_once(clock: Clock) -> None:
    tokens = {f"syt_{number}": f"@user{number}:hs" for number in range(50)}
    homeserver = FakeHomeserver(**tokens)
    bridge = make(homeserver, clock=clock)
    for token in tokens:
        await bridge.identify(Credential(token))
    clock.now += 601
    homeserver.gate.clear()
    for token in tokens:
        await bridge.identify(Credential(token))
    await until(lambda: homeserver.arrivals.qsize() == 50 + MAX_RENEWING)
    homeserver.gate.set()
    await bridge.identities.idle()
    for token in tokens:
        await bridge.identify(Credential(token))
    await until(lambda: homeserver.arrivals.qsize() == 50 + 2 * MAX_RENEWING)


async def test_401_on_a_call_makes_the_bridge_ask_again() -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    bridge = make(homeserver)
    caller = await bridge.identify(Credential("syt_a"))
    error = unknown_token()
    assert bridge.refused(caller, error) is error
    homeserver.accounts.clear()
    with pytest.raises(HomeserverError) as caught:
        await bridge.identify(Credential("syt_a"))
    assert (caught.value.status, caught.value.errcode) == (401, "M_UNKNOWN_TOKEN")
    assert len(homeserver.asked) == 2


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 502])
async def test_other_error_on_a_call_keeps_the_answer(status: int) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs", bot="@bot:hs")
    bridge = make(homeserver, api_keys=KEY, access_token="bot")
    error = HomeserverError("No.", errcode="M_FORBIDDEN", status=status)
    for credential in (Credential("syt_a"), Credential(None)):
        caller = await bridge.identify(credential)
        assert bridge.refused(caller, error) is error
        await bridge.identify(credential)
    assert homeserver.asked == ["syt_a", "bot"]


@pytest.mark.parametrize(
    "error",
    [
        unknown_token(),
        HomeserverError("x", errcode="M_X", status=500),
        HomeserverError("x", errcode="M_LIMIT_EXCEEDED", status=429, retry_after_ms=5),
    ],
)
async def test_failure_is_told_as_it_is_and_not_kept(error: MatrixError) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    homeserver.broken = error
    bridge = make(homeserver)
    with pytest.raises(MatrixError) as caught:
        await bridge.identify(Credential("syt_a"))
    assert caught.value is error
    homeserver.broken = None
    assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs"


# while the homeserver is away

AWAY = [
    BadGateway("away"),
    GatewayTimeout("hangs"),
    HomeserverError("x", errcode="M_UNKNOWN", status=500),
    HomeserverError("x", errcode="M_LIMIT_EXCEEDED", status=429, retry_after_ms=5),
]


IMPATIENT = Timing(patience_seconds=0.01)


@pytest.mark.parametrize("error", AWAY)
async def test_token_that_was_seen_before_is_known_while_the_homeserver_is_away(error: MatrixError) -> None:
    homeserver, memory = FakeHomeserver(syt_a="@alice:hs"), Memory(syt_a=ALICE)
    homeserver.broken = error
    bridge = make(homeserver, memory)
    for _ in range(3):
        assert await bridge.identify(Credential("syt_a")) == Caller(*ALICE, "syt_a")
    assert (homeserver.asked, memory.asked) == (["syt_a"], ["syt_a"])


async def test_token_that_was_seen_before_is_asked_anew_soon(clock: Clock) -> None:
    homeserver, memory = FakeHomeserver(), Memory(syt_a=ALICE)
    homeserver.broken = BadGateway("away")
    bridge = make(homeserver, memory, clock=clock)
    await bridge.identify(Credential("syt_a"))
    homeserver.broken = None  # it is back, and knows the token no more
    clock.now += 5.1
    await bridge.identify(Credential("syt_a"))
    await bridge.identities.idle()
    with pytest.raises(HomeserverError):
        await bridge.identify(Credential("syt_a"))


@pytest.mark.parametrize("error", [BadGateway("away"), GatewayTimeout("hangs")])
async def test_token_that_nobody_has_seen_is_a_503_while_the_homeserver_is_away(error: MatrixError) -> None:
    homeserver = FakeHomeserver(syt_a="@alice:hs")
    homeserver.broken = error
    bridge = make(homeserver)
    with pytest.raises(Unavailable, match=error.error) as caught:
        await bridge.identify(Credential("syt_a"))
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers()
    homeserver.broken = None
    assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs"


async def test_store_that_is_away_too_is_a_503() -> None:
    homeserver, memory = FakeHomeserver(), Memory(syt_a=ALICE)
    homeserver.broken, memory.broken = BadGateway("away"), StoreUnavailable("locked")
    with pytest.raises(Unavailable):
        await make(homeserver, memory).identify(Credential("syt_a"))


async def test_homeserver_that_hangs_is_not_waited_for_when_the_token_was_seen_before() -> None:
    homeserver, memory = FakeHomeserver(syt_a="@alice:hs"), Memory(syt_a=ALICE)
    homeserver.gate.clear()
    bridge = make(homeserver, memory, timing=IMPATIENT)
    async with asyncio.timeout(PATIENCE):
        found = await asyncio.gather(*(bridge.identify(Credential("syt_a")) for _ in range(50)))
    assert {caller.user_id for caller in found} == {"@alice:hs"}
    assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs"
    assert (homeserver.asked, memory.asked) == (["syt_a"], ["syt_a"])
    homeserver.accounts["syt_a"] = "@renamed:hs"
    homeserver.gate.set()
    await bridge.identities.idle()
    assert (await bridge.identify(Credential("syt_a"))).user_id == "@renamed:hs"


async def test_homeserver_that_hangs_is_waited_for_when_nobody_has_seen_the_token() -> None:
    homeserver, memory = FakeHomeserver(syt_a="@alice:hs"), Memory()
    homeserver.gate.clear()
    waiting = asyncio.create_task(make(homeserver, memory, timing=IMPATIENT).identify(Credential("syt_a")))
    await memory.arrivals.get()
    homeserver.gate.set()
    assert (await waiting).user_id == "@alice:hs"


async def test_homeserver_that_is_slow_is_waited_for_when_the_store_is_away() -> None:
    homeserver, memory = FakeHomeserver(syt_a="@alice:hs"), Memory(syt_a=ALICE)
    memory.broken = StoreUnavailable("locked")
    homeserver.gate.clear()
    waiting = asyncio.create_task(make(homeserver, memory, timing=IMPATIENT).identify(Credential("syt_a")))
    await memory.arrivals.get()
    homeserver.gate.set()
    assert (await waiting).user_id == "@alice:hs"


async def test_homeserver_that_answers_in_time_is_believed_and_the_store_not_asked() -> None:
    memory = Memory(syt_a=("@other:hs", None), syt_b=("@bob:hs", None))
    bridge = make(FakeHomeserver(syt_a="@alice:hs"), memory)
    assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs"
    with pytest.raises(HomeserverError) as caught:
        await bridge.identify(Credential("syt_b"))
    assert caught.value.status == 401
    assert memory.asked == []


async def test_401_that_comes_while_the_store_is_read_counts() -> None:
    homeserver, memory = FakeHomeserver(), Memory(syt_a=ALICE)
    homeserver.gate.clear()
    memory.gate.clear()
    bridge = make(homeserver, memory, timing=IMPATIENT)
    waiting = asyncio.create_task(bridge.identify(Credential("syt_a")))
    await memory.arrivals.get()
    homeserver.gate.set()
    for _ in range(5):
        await asyncio.sleep(0)  # until it has answered
    memory.gate.set()
    with pytest.raises(HomeserverError) as caught:
        await waiting
    assert caught.value.status == 401


@pytest.mark.parametrize("how", ["whoami", "call"])
async def test_token_that_was_refused_is_not_revived_by_an_outage(how: str) -> None:
    homeserver, memory = FakeHomeserver(syt_a="@alice:hs"), Memory(syt_a=ALICE)
    bridge = make(homeserver, memory)
    if how == "call":
        bridge.refused(await bridge.identify(Credential("syt_a")), unknown_token())
    else:
        homeserver.accounts.clear()
        with pytest.raises(HomeserverError):
            await bridge.identify(Credential("syt_a"))
    homeserver.broken = BadGateway("away")
    with pytest.raises(Unavailable):
        await bridge.identify(Credential("syt_a"))
    homeserver.broken, homeserver.accounts["syt_a"] = None, "@alice:hs"  # it was locked, no more
    await bridge.identify(Credential("syt_a"))
    bridge.identities.forget_user(None)
    homeserver.broken = BadGateway("away")
    assert (await bridge.identify(Credential("syt_a"))).user_id == "@alice:hs", "it is dead no more"


async def test_nothing_grows_with_the_number_of_wrong_tokens() -> None:
    homeserver, memory = FakeHomeserver(), Memory(syt_0=ALICE, syt_299=ALICE)
    bridge = make(homeserver, memory, max_kept=100)
    for number in range(300):
        with pytest.raises(HomeserverError):
            await bridge.identify(Credential(f"syt_{number}"))
    await bridge.identities.idle()
    homeserver.broken = BadGateway("away")
    with pytest.raises(Unavailable):
        await bridge.identify(Credential("syt_299"))
    assert (await bridge.identify(Credential("syt_0"))).user_id == "@alice:hs", "its refusal is forgotten"


async def test_oldest_answer_makes_room_for_a_new_one() -> None:
    homeserver = FakeHomeserver(a="@a:hs", b="@b:hs", c="@c:hs")
    bridge = make(homeserver, max_kept=2)
    for token in ("a", "b", "c", "b", "c", "a"):
        await bridge.identify(Credential(token))
    assert homeserver.asked == ["a", "b", "c", "a"]


# the bot


async def test_bot_by_token_is_its_account() -> None:
    bridge = make(FakeHomeserver(bot="@bot:hs"), access_token="bot")
    assert (
        await bridge.bot.caller()
        == await bridge.identify(Credential(None))
        == Caller("@bot:hs", "DEVICE", "bot", bot=True)
    )


async def test_bridge_without_a_bot_has_none() -> None:
    assert await make().bot.caller() is None


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_bot_is_a_502_and_not_the_callers_fault(status: int) -> None:
    homeserver = FakeHomeserver(bot="@bot:hs")
    bridge = make(homeserver, access_token="bot")
    homeserver.broken = HomeserverError("Account deactivated", errcode="M_USER_DEACTIVATED", status=status)
    with pytest.raises(BadGateway, match="Account deactivated") as caught:
        await bridge.identify(Credential(None))
    assert caught.value.status == 502


async def test_bots_token_refused_on_a_call_is_a_502() -> None:
    bridge = make(FakeHomeserver(bot="@bot:hs"), access_token="bot")
    caller = await bridge.identify(Credential(None))
    error = bridge.refused(caller, unknown_token())
    assert isinstance(error, BadGateway)
    assert "soft_logout" not in error.extra


async def test_bots_other_trouble_passes() -> None:
    homeserver = FakeHomeserver(bot="@bot:hs")
    homeserver.broken = HomeserverError("Slow down", errcode="M_LIMIT_EXCEEDED", status=429, retry_after_ms=5)
    with pytest.raises(HomeserverError) as caught:
        await make(homeserver, access_token="bot").identify(Credential(None))
    assert caught.value.status == 429


@pytest.mark.parametrize("key_first", [True, False])
async def test_bots_own_token_used_by_a_caller_is_no_key(*, key_first: bool) -> None:
    homeserver = FakeHomeserver(bot="@bot:hs")
    bridge = make(homeserver, access_token="bot")
    order = [Credential(None), Credential("bot")] if key_first else [Credential("bot"), Credential(None)]
    found = {credential: await bridge.identify(credential) for credential in order}
    assert found[Credential(None)].bot
    assert not found[Credential("bot")].bot
    assert bridge.refused(found[Credential("bot")], unknown_token()).status == 401
    assert bridge.refused(found[Credential(None)], unknown_token()).status == 502


async def test_password_logs_in_once_for_many_callers() -> None:
    homeserver = FakeHomeserver()
    homeserver.gate.clear()
    bridge = make(homeserver, user="bot", password="pw")
    waiting = asyncio.gather(*(bridge.identify(Credential(None)) for _ in range(50)))
    await homeserver.arrivals.get()
    homeserver.gate.set()
    assert {caller.user_id for caller in await waiting} == {"@bot:hs"}
    assert homeserver.logins == [("bot", "pw", device_id())]
    assert homeserver.asked == ["login1"]


async def test_password_logs_in_again_after_a_401_on_a_call() -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver, user="bot", password="pw")
    caller = await bridge.identify(Credential(None))
    homeserver.accounts.clear()
    assert bridge.refused(caller, unknown_token()).status == 502
    assert (await bridge.identify(Credential(None))).token == "login2"
    assert bridge.refused(caller, unknown_token()).status == 502  # late news of the old token
    assert (await bridge.identify(Credential(None))).token == "login2"
    assert len({device for _, _, device in homeserver.logins}) == 1


async def test_password_logs_in_again_after_a_401_on_whoami(clock: Clock) -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver, user="bot", password="pw", clock=clock)
    await bridge.identify(Credential(None))
    homeserver.accounts.clear()
    clock.now += 601
    assert (await bridge.identify(Credential(None))).token == "login1"
    await bridge.identities.idle()
    assert (await bridge.identify(Credential(None))).token == "login2"
    assert len(homeserver.logins) == 2


async def test_token_from_the_settings_is_kept_after_a_401() -> None:
    homeserver = FakeHomeserver(bot="@bot:hs")
    bridge = make(homeserver, access_token="bot")
    caller = await bridge.identify(Credential(None))
    bridge.refused(caller, unknown_token())
    assert (await bridge.identify(Credential(None))).token == "bot"
    assert homeserver.asked == ["bot", "bot"]
    assert homeserver.logins == []


async def test_wrong_password_is_a_502_and_tried_again_later_and_not_at_once(clock: Clock) -> None:
    homeserver = FakeHomeserver()
    homeserver.broken = HomeserverError("Invalid username or password", errcode="M_FORBIDDEN", status=403)
    bridge = make(homeserver, user="bot", password="pw", clock=clock)
    with pytest.raises(BadGateway, match="Invalid username"):
        await bridge.identify(Credential(None))
    homeserver.broken = None
    with pytest.raises(BadGateway, match="Invalid username"):
        await bridge.identify(Credential(None))
    clock.now += 11
    assert (await bridge.identify(Credential(None))).user_id == "@bot:hs"


async def test_login_that_fails_fails_for_all_who_wait() -> None:
    homeserver = FakeHomeserver()
    homeserver.gate.clear()
    homeserver.broken = GatewayTimeout("hangs")
    bridge = make(homeserver, user="bot", password="pw")
    waiting = asyncio.gather(*(bridge.identify(Credential(None)) for _ in range(50)), return_exceptions=True)
    await homeserver.arrivals.get()
    homeserver.gate.set()
    assert {type(outcome) for outcome in await waiting} == {GatewayTimeout}
    assert len(homeserver.logins) == 1
    homeserver.broken = None
    assert (await bridge.identify(Credential(None))).user_id == "@bot:hs"


async def test_caller_who_leaves_does_not_end_the_login_for_others() -> None:
    homeserver = FakeHomeserver()
    homeserver.gate.clear()
    bridge = make(homeserver, user="bot", password="pw")
    first, second = (asyncio.create_task(bridge.identify(Credential(None))) for _ in range(2))
    await homeserver.arrivals.get()
    first.cancel()
    homeserver.gate.set()
    assert (await second).token == "login1"
    assert len(homeserver.logins) == 1


async def test_bot_with_a_password_is_renewed_once_for_many_lanes() -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver, user="bot", password="pw")
    old = await bridge.identify(Credential(None))
    del homeserver.accounts[old.token]
    renewed = await asyncio.gather(*(bridge.bot.renew(old.token) for _ in range(20)))
    assert renewed == [Caller("@bot:hs", "DEVICE", "login2", bot=True)] * 20
    assert await bridge.bot.renew(old.token) == renewed[0]  # late news
    assert len(homeserver.logins) == 2
    with pytest.raises(HomeserverError):  # as a caller's own token it is dead, too
        await bridge.identify(Credential(old.token))


async def test_bot_with_a_token_or_none_is_not_renewed() -> None:
    homeserver = FakeHomeserver(bot="@bot:hs")
    assert await make(homeserver, access_token="bot").bot.renew("bot") is None
    assert await make(homeserver).bot.renew("bot") is None
    assert (homeserver.asked, homeserver.logins) == ([], [])


async def test_bot_that_cannot_be_renewed_is_a_502() -> None:
    homeserver = FakeHomeserver()
    bridge = make(homeserver, user="bot", password="pw")
    old = await bridge.identify(Credential(None))
    homeserver.broken = HomeserverError("Invalid username or password", errcode="M_FORBIDDEN", status=403)
    with pytest.raises(BadGateway, match="Invalid username"):
        await bridge.bot.renew(old.token)


# a caller with a key


async def test_key_is_told_with_the_caller() -> None:
    bridge = make(FakeHomeserver(bot="@bot:hs"), api_keys=KEY, access_token="bot")
    credential = await bridge.credential({"x-api-key": KEY}, b"")
    assert await bridge.identify(credential) == Caller("@bot:hs", "DEVICE", "bot", bot=True, key=FIXED)
    assert await bridge.bot.caller() == Caller("@bot:hs", "DEVICE", "bot", bot=True)
