"""callers, bot and names of flowbridge.auth: whose event it is while the homeserver does not say so."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from flowbridge.auth.bot_token import BotToken
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.identities import RETRY_SECONDS
from flowbridge.auth.names import Names
from flowbridge.errors import BadGateway, HomeserverError, MatrixError, Unauthorized, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.models import ApiKey, Caller
from flowbridge.settings import Settings
from flowbridge.store import Database, resolved
from tests.unit import Clock
from tests.unit.auth.test_callers import ALICE, FakeHomeserver, Memory
from tests.unit.auth.test_callers import make as make_callers

BY_KEY = Credential(None, ApiKey("k"))
AWAY = BadGateway("cannot connect")

pytestmark = pytest.mark.usefixtures("nothing_set")


class FakeNames:
    """What was written down; None is a store that is away."""

    def __init__(self, **known: str) -> None:
        self.known = known

    async def find(self, name: str) -> str | None:
        return self.known.get(name)

    def note(self, name: str, value: str) -> None:
        self.known[name] = value


def make(homeserver: FakeHomeserver, names: FakeNames | None = None, **values: Any) -> Callers:
    return make_callers(homeserver, names=cast("Names", names or FakeNames()), **values)


def author_of(found: Caller) -> tuple[str, str]:
    assert found.bot
    assert found.key == BY_KEY.key
    return found.user_id, found.token


@pytest.fixture
def clock() -> Clock:
    return Clock()


Hold = Callable[[str | None], None]


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hold:
    """`hold(text)`: what the file of the token holds from now on; None: there is no file."""
    file = tmp_path / "secret"
    file.write_text("old\n")
    monkeypatch.setenv("ACCESS_TOKEN_FILE", str(file))

    def write(text: str | None) -> None:
        if text is None:
            file.unlink()
        else:
            file.write_text(text)

    return write


async def test_author_is_the_bot_with_its_token_as_long_as_that_is_good() -> None:
    homeserver = FakeHomeserver(good="@bot:hs")
    callers = make(homeserver, access_token="good")
    for _ in range(3):
        assert author_of(await callers.author(BY_KEY)) == ("@bot:hs", "good")
    assert homeserver.asked == ["good"]


async def test_author_whose_token_is_refused_stays_known_without_one(clock: Clock) -> None:
    homeserver = FakeHomeserver(good="@bot:hs")
    callers = make(homeserver, access_token="good", clock=clock)
    await callers.author(BY_KEY)
    homeserver.accounts.clear()
    callers.identities.forget("good")
    for _ in range(3):
        assert author_of(await callers.author(BY_KEY)) == ("@bot:hs", "")
    assert len(homeserver.asked) == 2  # it is not asked for each event
    homeserver.accounts["good"] = "@bot:hs"
    clock.now += RETRY_SECONDS + 0.1
    assert author_of(await callers.author(BY_KEY)) == ("@bot:hs", "good")


@pytest.mark.parametrize("account", [{"access_token": "good"}, {"user": "bot", "password": "p"}])
async def test_author_is_known_to_the_next_process_while_the_homeserver_is_away(account: dict[str, Any]) -> None:
    homeserver, names = FakeHomeserver(good="@bot:hs"), FakeNames()
    await make(homeserver, names, **account).author(BY_KEY)
    homeserver.broken = AWAY
    assert author_of(await make(homeserver, names, **account).author(BY_KEY)) == ("@bot:hs", "")


async def test_author_of_another_homeserver_is_not_this_one() -> None:
    homeserver, names = FakeHomeserver(good="@bot:hs"), FakeNames()
    await make(homeserver, names, access_token="good").author(BY_KEY)
    homeserver.broken = AWAY
    with pytest.raises(Unavailable):
        await make(homeserver, names, access_token="good", base_url="https://elsewhere").author(BY_KEY)


async def test_author_is_not_waited_for_when_it_is_known() -> None:
    homeserver, names = FakeHomeserver(), FakeNames()
    homeserver.gate.clear()
    callers = make(homeserver, names, user="@bot:hs", password="p")
    assert author_of(await asyncio.wait_for(callers.author(BY_KEY), 5)) == ("@bot:hs", "")


@pytest.mark.parametrize("user", ["bot", "@Bot:hs", "@bot"])
async def test_author_that_nobody_knows_is_a_503(user: str) -> None:
    homeserver = FakeHomeserver()
    homeserver.broken = AWAY
    with pytest.raises(Unavailable) as caught:
        await make(homeserver, user=user, password="p").author(BY_KEY)
    assert caught.value.headers()["Retry-After"]


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_callers_own_token_that_nobody_knows_is_a_503(status: int) -> None:
    homeserver = FakeHomeserver()
    homeserver.broken = HomeserverError("trouble", errcode="M_UNKNOWN", status=status)
    with pytest.raises(Unavailable):
        await make(homeserver).author(Credential("alice"))


async def test_callers_own_token_that_is_refused_is_told_as_it_is() -> None:
    with pytest.raises(HomeserverError) as caught:
        await make(FakeHomeserver()).author(Credential("alice"))
    assert caught.value.status == 401


# secrets in files


async def test_token_is_read_again_from_its_file_when_it_is_refused(hold: Hold) -> None:
    homeserver = FakeHomeserver(old="@bot:hs", new="@bot:hs")
    callers = make(homeserver)
    met: list[str] = []
    callers.bot.on_new = lambda caller: met.append(caller.token)
    await callers.author(BY_KEY)
    del homeserver.accounts["old"]
    hold("new")
    assert author_of(await callers.author(BY_KEY)) == ("@bot:hs", "old")  # it is not known yet
    bot = await callers.bot.renew("old")
    assert bot is not None
    assert (bot.token, met) == ("new", ["old", "new"])
    assert author_of(await callers.author(BY_KEY)) == ("@bot:hs", "new")


@pytest.mark.parametrize("content", ["", "two words", "old", None])
async def test_file_without_another_token_changes_nothing(hold: Hold, content: str | None) -> None:
    homeserver = FakeHomeserver(old="@bot:hs")
    callers = make(homeserver)
    await callers.bot.caller()
    hold(content)
    assert await callers.bot.renew("old") is None
    assert (await callers.bot.caller() or Caller("", None, "")).token == "old"


async def test_token_that_is_no_good_does_not_replace_a_good_one_on_reload(hold: Hold) -> None:
    homeserver = FakeHomeserver(old="@bot:hs", new="@bot:hs")
    callers = make(homeserver)
    await callers.bot.caller()
    for content, now in [("bad", "old"), ("new", "new")]:
        hold(content)
        await callers.bot.reload()
        assert (await callers.bot.caller() or Caller("", None, "")).token == now


async def test_token_that_did_not_come_from_a_file_is_read_from_none(
    hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCESS_TOKEN", "given")
    token = BotToken(Settings.load(), cast("Homeserver", FakeHomeserver()))
    hold("another")
    assert not token.forget("given")
    assert token.current == "given"


# tokens that end


async def test_all_tokens_of_a_user_are_asked_for_again_and_no_others() -> None:
    homeserver = FakeHomeserver(phone="@alice:hs", desk="@alice:hs", bob="@bob:hs")
    told: list[str | None] = []
    callers = make(homeserver, memory=Memory(phone=ALICE), on_revoked=told.append)
    for token in ("phone", "desk", "bob"):
        await callers.identify(Credential(token))
    del homeserver.accounts["phone"]
    callers.identities.forget_user("@alice:hs")
    homeserver.asked.clear()
    with pytest.raises(MatrixError):
        await callers.identify(Credential("phone"))
    for token in ("desk", "bob"):
        await callers.identify(Credential(token))
    assert (homeserver.asked, told) == (["phone", "desk"], ["@alice:hs"])


async def test_tokens_that_may_have_ended_of_an_unknown_user_are_asked_for_again_and_stay_good_until_then() -> None:
    homeserver = FakeHomeserver(phone="@alice:hs", bob="@bob:hs")
    told: list[str] = []
    callers = make(homeserver, memory=Memory(phone=ALICE), on_revoked=told.append)
    for token in ("phone", "bob"):
        await callers.identify(Credential(token))
    homeserver.broken = AWAY
    callers.identities.forget_user(None)
    for token in ("phone", "bob"):
        assert (await callers.author(Credential(token))).token == token
    await callers.identities.idle()
    assert (homeserver.asked, told) == (["phone", "bob"] * 2, [])
    callers.identities.forget_user(None)
    homeserver.broken = None
    del homeserver.accounts["phone"]
    for token in ("phone", "bob"):
        await callers.author(Credential(token))
    await callers.identities.idle()
    with pytest.raises(MatrixError):
        await callers.author(Credential("phone"))
    assert (await callers.author(Credential("bob"))).token == "bob"


async def test_token_that_may_have_ended_is_not_revived_by_an_outage() -> None:
    homeserver = FakeHomeserver(phone="@alice:hs")
    callers = make(homeserver, memory=Memory(phone=ALICE))
    await callers.identify(Credential("phone"))
    callers.identities.forget_user("@alice:hs")
    homeserver.broken = AWAY
    with pytest.raises(Unavailable):
        await callers.author(Credential("phone"))


async def test_token_that_is_not_known_is_nobodys() -> None:
    assert await make(FakeHomeserver()).identities.user_of("unknown") is None
    assert await make(FakeHomeserver(phone="@alice:hs")).identities.user_of("phone") == "@alice:hs"


async def test_bots_token_is_asked_for_every_5_s(clock: Clock) -> None:
    homeserver = FakeHomeserver(good="@bot:hs")
    callers = make(homeserver, access_token="good", clock=clock)
    for _ in range(3):
        await callers.bot.check()
    assert homeserver.asked == ["good"]
    homeserver.accounts.clear()
    clock.now += RETRY_SECONDS + 0.1
    with pytest.raises(BadGateway):
        await callers.bot.check()
    assert await make(homeserver).bot.check() is None


# names


async def test_name_is_known_to_the_next_process(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    names = Names(database, max_noted=3)
    assert await names.find("a") is None  # the store is not open
    names.note("a", "nothing")  # nor can it be written
    database.open()
    database.start()
    names.begin()
    for value in ("one", "two", "two"):
        names.note("a", value)
    await database.run(lambda connection: None)
    assert await Names(database).find("a") == "two"
    assert await names.find("b") is None
    for number in range(10):
        names.note(f"n{number}", "x")
    gone = await database.run(lambda connection: resolved.forget(connection, 2**60))
    assert gone == 11
    await database.stop()


def test_refusal_of_nobody_is_not_the_bots() -> None:
    """A caller without a token asked nothing: there is nothing to forget."""
    callers = make(FakeHomeserver(), access_token="good")
    error = Unauthorized("no token")
    assert callers.refused(Caller("@bot:hs", None, "", bot=True), error) is error
