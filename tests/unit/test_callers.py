"""flowbridge.callers: who may call, and how seldom the homeserver is asked."""

import asyncio
from typing import Any, cast

import pytest

from flowbridge import callers
from flowbridge.callers import Callers, Credential
from flowbridge.errors import BadGateway, HomeserverError, MatrixError, Unauthorized
from flowbridge.homeserver import Homeserver
from flowbridge.models import Caller
from flowbridge.settings import Settings
from tests.unit import Clock

KEY = "fb_key"

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


def make(homeserver: FakeHomeserver | None = None, **values: Any) -> Callers:
    settings = Settings.load(**values)
    return Callers(settings, cast("Homeserver", homeserver or FakeHomeserver()))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callers, "time", clock)
    return clock


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
def test_token_is_taken_from_header_or_query(headers: dict[str, str], query: bytes, token: str) -> None:
    assert make().credential(headers, query) == Credential(token)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"x-api-key": KEY}, b""),
        ({"authorization": f"Bearer {KEY}"}, b""),
        ({"x-api-key": KEY, "authorization": "Bearer syt_a"}, b"access_token=syt_b"),
    ],
)
def test_right_key_is_the_bot(headers: dict[str, str], query: bytes) -> None:
    assert make(api_keys=f"fb_other,{KEY}", access_token="bot").credential(headers, query) == Credential(None)


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
def test_neither_token_nor_key_is_a_missing_token(headers: dict[str, str], query: bytes) -> None:
    with pytest.raises(Unauthorized) as caught:
        make(api_keys=KEY, access_token="bot").credential(headers, query)
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
def test_token_that_can_be_none_is_refused_here(headers: dict[str, str], query: bytes) -> None:
    with pytest.raises(Unauthorized) as caught:
        make().credential(headers, query)
    assert caught.value.errcode == "M_UNKNOWN_TOKEN"


@pytest.mark.parametrize("key", ["fb_wrong", "fb_", "fb_ke", "fb_keyy", "FB_KEY", "fb_k\xe9y", "unprefixed", "fb_\xff"])
def test_wrong_key_is_refused_and_not_repeated(key: str) -> None:
    for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
        if "authorization" in headers and not key.startswith("fb_"):
            continue  # a token
        with pytest.raises(Unauthorized) as caught:
            make(api_keys=KEY, access_token="bot").credential(headers, b"")
        assert caught.value.errcode == "M_UNKNOWN_TOKEN"
        assert key == "fb_" or key not in caught.value.error


def test_wrong_key_is_not_helped_by_a_right_token() -> None:
    with pytest.raises(Unauthorized):
        make(api_keys=KEY).credential({"x-api-key": "fb_wrong", "authorization": "Bearer syt_a"}, b"")


def test_key_without_a_bot_names_the_setting() -> None:
    with pytest.raises(Unauthorized, match="ACCESS_TOKEN"):
        make(api_keys=KEY).credential({"x-api-key": KEY}, b"")
    with pytest.raises(Unauthorized) as caught:
        make(api_keys=KEY).credential({"x-api-key": "fb_wrong"}, b"")
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
    bridge = make(homeserver)
    await bridge.identify(Credential("syt_a"))
    clock.now += 599
    await bridge.identify(Credential("syt_a"))
    assert len(homeserver.asked) == 1
    clock.now += 2
    await bridge.identify(Credential("syt_a"))
    assert len(homeserver.asked) == 2


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
    "error", [unknown_token(), BadGateway("away"), HomeserverError("x", errcode="M_X", status=500)]
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


async def test_oldest_answer_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "MAX_KEPT", 2)
    homeserver = FakeHomeserver(a="@a:hs", b="@b:hs", c="@c:hs")
    bridge = make(homeserver)
    for token in ("a", "b", "c", "b", "c", "a"):
        await bridge.identify(Credential(token))
    assert homeserver.asked == ["a", "b", "c", "a"]


# the bot


async def test_bot_by_token_is_its_account() -> None:
    bridge = make(FakeHomeserver(bot="@bot:hs"), access_token="bot")
    assert await bridge.bot() == await bridge.identify(Credential(None)) == Caller("@bot:hs", "DEVICE", "bot", bot=True)


async def test_bridge_without_a_bot_has_none() -> None:
    assert await make().bot() is None


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
    assert homeserver.logins == [("bot", "pw", callers.device_id())]
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
    bridge = make(homeserver, user="bot", password="pw")
    await bridge.identify(Credential(None))
    homeserver.accounts.clear()
    clock.now += 601
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
    bridge = make(homeserver, user="bot", password="pw")
    with pytest.raises(BadGateway, match="Invalid username"):
        await bridge.identify(Credential(None))
    homeserver.broken = None
    with pytest.raises(BadGateway, match="Invalid username"):
        await bridge.identify(Credential(None))
    clock.now += 11
    assert (await bridge.identify(Credential(None))).user_id == "@bot:hs"
