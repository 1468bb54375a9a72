"""flowbridge.cli.deliveries: `flowbridge deliveries`, on each engine."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import Connection

from flowbridge import log
from flowbridge.cli import main as command_line
from flowbridge.cli import purge
from flowbridge.settings import Settings
from flowbridge.store import Database, abandoned, clock, leases, outbox, refused, resolved, tables
from tests import upstream as scripted
from tests.integration.store.events import event
from tests.integration.store.test_refused import call
from tests.upstream import Upstream

ROOM, OTHER = "!room:example.org", "!other:example.org"
HOUR = 3_600_000
REFUSED = json.dumps({"status": 403, "errcode": "M_FORBIDDEN", "error": "You are not in the room"})

pytestmark = pytest.mark.usefixtures("nothing_set")


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """`flowbridge deliveries` on one database."""

    database_url: str
    run: Callable[..., Done]

    def __call__(self, *arguments: str) -> Done:
        return self.run("deliveries", *arguments)

    def json(self, *arguments: str) -> Any:
        done = self(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    def list(self, *arguments: str) -> list[str]:
        return [one["delivery_id"] for one in self.json("list", *arguments)["deliveries"]]


@pytest.fixture
def cli(empty_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """With nothing in the log."""
    monkeypatch.setenv("FLOWBRIDGE_DATABASE_URL", empty_url)
    monkeypatch.setattr(log, "setup", lambda *_: None)  # the log is pytest's
    monkeypatch.setenv("COLUMNS", "80")  # of a terminal, which this is not

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["flowbridge", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        printed = capsys.readouterr()
        return Done(int(ended.value.code or 0), printed.out, printed.err)

    return Cli(empty_url, run)


def put(cli: Cli, *names: str, room: str = ROOM, lane: str = "", **values: Any) -> None:
    database = Database(cli.database_url)
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        outbox.insert_rows(connection, [event(name, lane or f"account|{room}", **values) for name in names])
    database.engine.dispose()


def put_dead(cli: Cli, *names: str, **values: Any) -> None:
    put(cli, *names, **{"state": "dead", "error": REFUSED, "settled_at": clock.now_ms(), **values})


# list and show


def test_list_is_a_line_for_each_the_newest_first(cli: Cli) -> None:
    put(cli, "sent", state="sent", event_id="$event", settled_at=1, api_key="key-id", attempts=1)
    put_dead(cli, "dead", room=OTHER)
    done = cli("list")
    assert done.code == 0, done.err
    head, dead, sent = (line.split() for line in done.out.splitlines())
    assert head[:3] == ["DELIVERY", "ROOM", "STATUS"]
    assert dead[:3] == ["dead", OTHER, "dead"]
    assert dead[-5:] == ["You", "are", "not", "in", "the", "room"][-5:]
    assert [*sent[:4], *sent[5:]] == ["sent", ROOM, "sent", "m.room.message", "key-id", "1", "$event"]


def test_list_is_chosen_by_options(cli: Cli) -> None:
    now = clock.now_ms()
    put(cli, "old", accepted_at=now - 3 * HOUR)
    put(cli, "topic", event_type="m.room.topic", accepted_at=now - HOUR)
    put_dead(cli, "dead", room=OTHER, accepted_at=now)
    assert cli.list() == ["dead", "topic", "old"]
    assert cli.list("--limit", "2") == ["dead", "topic"]
    assert cli.list("--state", "dead") == ["dead"]
    assert cli.list("--state", "dead", "--state", "queued") == ["dead", "topic", "old"]
    assert cli.list("--room", OTHER) == ["dead"]
    assert cli.list("--type", "m.room.topic") == ["topic"]
    assert cli.list("--since", "2h") == ["dead", "topic"]
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now / 1000 - 1_800))
    assert cli.list("--since", since) == ["dead"]
    assert cli.list("--room", "!nowhere:example.org") == []
    assert cli("list", "--room", "!nowhere:example.org").err == "flowbridge: no such deliveries\n"


def test_show_prints_request_event_and_history(cli: Cli) -> None:
    history = [{"at": 1_000, "ms": 7, "status": 403, "errcode": "M_FORBIDDEN", "error": "no"}]
    put_dead(cli, "a", content='{"body":"é"}', request='{"payload": "é"}', history=json.dumps(history))
    found = cli.json("show", "a")
    assert (found["event"]["content"], found["request"]) == ({"body": "é"}, '{"payload": "é"}')
    assert found["history"][0] == {
        "time": "1970-01-01T00:00:01.000Z", "milliseconds": 7, "status": 403, "errcode": "M_FORBIDDEN", "error": "no",
    }  # fmt: skip
    said = cli("show", "a").out
    assert all(word in said for word in ("é", "M_FORBIDDEN", "7 ms", '{"payload": "é"}', ROOM))


def test_what_is_shown_cannot_steer_the_terminal(cli: Cli) -> None:
    evil = "\x1b[2J\x9b31m\u202e\x07[red]"
    put_dead(
        cli, "a",
        event_type="[bold]type", content=json.dumps({"body": evil}, ensure_ascii=False), request=evil,
        error=json.dumps({"status": 403, "errcode": "M_FORBIDDEN", "error": evil}),
    )  # fmt: skip
    said = [
        cli("list").out,
        cli("show", "a").out,
        cli("list", "--json").out,
        cli("show", "a", "--json").out,
    ]
    for text in said:
        assert not set("\x1b\x9b\u202e\x07") & set(text)
        assert "[bold]type" in text
        assert "[red]" in text
    assert cli.json("show", "a")["request"] == evil


def test_unknown_delivery_is_one_line_and_exit_code_1(cli: Cli) -> None:
    for name in ("nothing", "'; DROP TABLE outbox; --", "é", "x" * 5_000, "\x1b[31m", "\udcff"):
        for command in ("show", "replay"):
            done = cli(command, name)
            assert (done.code, done.out) == (1, "")
            assert done.err.startswith("flowbridge: there is no delivery ")
            assert len(done.err.splitlines()) == 1
            assert "\x1b" not in done.err


# replay and purge


def test_replay_queues_and_says_what_it_cannot(cli: Cli) -> None:
    put_dead(cli, "a", "b")
    put(cli, "queued")
    done = cli("replay", "b", "queued", "nothing", "a")
    assert done.code == 1
    assert done.out.splitlines() == ["b is queued", "a is queued"]
    assert done.err.splitlines() == [
        "flowbridge: queued is queued already",
        "flowbridge: there is no delivery nothing",
    ]
    assert cli.list() == ["a", "b", "queued"]
    assert cli.json("show", "a")["history"][-1]["replayed"]["by"].startswith("cli:")


def test_replay_of_the_dead_takes_all_that_are_meant_in_their_order(cli: Cli) -> None:
    names = [f"dead-{number}" for number in range(250)]
    put_dead(cli, *names)
    put_dead(cli, "elsewhere", room=OTHER)
    put_dead(cli, "topic", event_type="m.room.topic")
    put(cli, "sent", state="sent", settled_at=1)
    done = cli("replay", "--dead", "--room", ROOM, "--type", "m.room.message")
    assert (done.code, done.out) == (0, "250 of 250 dead letters are queued\n")
    assert cli.list("--state", "queued", "--limit", "1000") == names[::-1]
    assert sorted(cli.list("--state", "dead")) == ["elsewhere", "topic"]
    assert cli("replay", "--dead", "--room", ROOM, "--type", "m.room.message").out.startswith("0 of 0 ")


def test_state_whose_room_cannot_be_asked_is_replayed_only_with_overwrite(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ACCESS_TOKEN", "bot")
    monkeypatch.setenv("FLOWBRIDGE_SECRET_KEY", Fernet.generate_key().decode())
    put_dead(cli, "topic", "name", event_type="m.room.topic", state_key="", api_key="one")
    put_dead(cli, "message")
    for arguments in (["topic"], ["--dead"]):
        done = cli("replay", *arguments)
        assert done.code == 1
        assert "topic: " in done.err
        assert "--overwrite" in done.err
    assert cli.list("--state", "queued") == ["message"]
    assert cli("replay", "topic", "--overwrite").out == "topic is queued\n"
    assert cli("replay", "--dead", "--overwrite").out == "1 of 1 dead letters are queued\n"


def test_purge_takes_what_is_settled_and_old(cli: Cli) -> None:
    now = clock.now_ms()
    put(cli, "queued", accepted_at=1)
    for age, number in ((3, "old"), (0, "new")):
        put_dead(cli, f"dead-{number}", settled_at=now - age * HOUR)
        put(cli, f"sent-{number}", state="sent", settled_at=now - age * HOUR)
    assert cli("purge", "--state", "dead", "--older-than", "2h", "--yes").out == "1 deliveries are deleted\n"
    assert cli.list() == ["sent-new", "dead-new", "sent-old", "queued"]
    assert cli("purge", "--older-than", "2h", "--yes").out == "1 deliveries are deleted\n"
    assert cli.list() == ["sent-new", "dead-new", "queued"]
    assert cli("purge", "--yes").out == "2 deliveries are deleted\n"
    assert cli.list() == ["queued"]
    assert cli("purge", "--yes").out == "0 deliveries are deleted\n"


def test_purge_without_anybody_to_ask_deletes_nothing(cli: Cli) -> None:
    put_dead(cli, "a")
    done = cli("purge")
    assert (done.code, done.out) == (2, "")
    assert "--yes" in done.err
    assert cli.list() == ["a"]


def test_purge_of_the_queued_takes_those_of_a_user_a_room_or_a_key(cli: Cli) -> None:
    number = abandoned.EVENTS + 1  # per room: more than go at once
    know(cli, "hog", "@hog:example.org")
    know(cli, "bot", "@bot:example.org")
    for room in (ROOM, OTHER):
        put(cli, *(f"hog-{room}-{n}" for n in range(number)), lane=f"hog|{room}")
        for key in ("one", "two"):
            put(cli, f"{key}-{room}", lane=f"bot|{room}", api_key=key)
    put(cli, "sent", lane=f"hog|{ROOM}", state="sent", settled_at=1)

    assert cli("purge", "--queued", "--room", OTHER, "--key", "one", "--yes").out == "1 queued events are deleted\n"
    done = cli("purge", "--queued", "--user", "@hog:example.org", "--yes")
    assert done.out == f"{2 * number} queued events are deleted\n"
    assert sorted(cli.list()) == sorted(["sent", f"one-{ROOM}", f"two-{ROOM}", f"two-{OTHER}"])
    assert cli("purge", "--queued", "--key", "two", "--yes").out == "2 queued events are deleted\n"
    assert cli("purge", "--queued", "--user", "@nobody:example.org", "--yes").out == "0 queued events are deleted\n"
    assert cli("purge", "--queued", "--all", "--yes").out == "1 queued events are deleted\n"
    assert cli.list() == ["sent"]


def test_purge_of_the_queued_says_of_whom_they_are_before_it_does_anything(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(cli, "bot", "@bot:example.org")
    put(cli, "a", "b", lane=f"bot|{ROOM}", api_key="key-1")
    put(cli, "c", lane=f"stranger|{ROOM}")
    asked: list[str] = []
    monkeypatch.setattr(purge, "confirmed", asked.append)
    assert cli("purge", "--queued", "--all").code == 1
    assert asked == [
        "Delete 3 queued events (2 of @bot:example.org (API key key-1), 1 of an unknown user)? They will not be sent."
    ]
    assert len(cli.list()) == 3


def test_purge_of_the_queued_leaves_what_a_running_bridge_does_not_let_go_of(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOWBRIDGE_LEASE_SECONDS", "5.2")
    monkeypatch.setenv("FLOWBRIDGE_REQUEST_SECONDS", "0.1")
    put(cli, "held", lane=f"hog|{ROOM}")
    put(cli, "free", lane=f"hog|{OTHER}")
    hold(cli, f"hog|{ROOM}", clock.now_ms() + HOUR)
    assert purge.purge_queued(Settings.load(), everything=True, yes=True, margin=-4.9) == 1
    printed = capsys.readouterr()
    assert printed.out == "1 queued events are deleted\n"
    assert printed.err == "flowbridge: 1 stay: a running bridge is sending them, or has not let go of their rooms\n"
    assert cli.list() == ["held"]
    hold(cli, f"hog|{ROOM}", clock.now_ms() - 1)  # its owner is dead
    assert cli("purge", "--queued", "--all", "--yes").code == 0
    assert cli.list() == []


def know(cli: Cli, account: str, user_id: str) -> None:
    with working(cli) as connection:
        connection.execute(tables.accounts.insert().values(account=account, user_id=user_id))


def hold(cli: Cli, lane: str, until: int) -> None:
    with working(cli) as connection:
        leases.mark_dirty(connection, [(lane, lane.partition("|")[0])])
        chosen = tables.lanes.update().where(tables.lanes.c.lane == lane)
        connection.execute(chosen.values(owner="other", fence=3, lease_until=until))


@contextlib.contextmanager
def working(cli: Cli) -> Iterator[Connection]:
    database = Database(cli.database_url)
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        yield connection
    database.engine.dispose()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["purge", "--queued", "--yes"], "--queued: "),
        (["purge", "--queued", "--all", "--state", "dead"], "--queued goes with"),
        (["purge", "--queued", "--all", "--older-than", "1d"], "--queued goes with"),
        (["purge", "--queued", "--user", "hog"], "--user: "),
        (["purge", "--queued", "--user", "\x1b[31m"], "--user: "),
        (["purge", "--queued", "--room", "a\nb"], "--room "),
        (["purge", "--user", "@hog:example.org", "--yes"], "go with --queued only"),
        (["list", "--state", "alive"], "--state: "),
        (["list", "--room", "a\nb"], "--room "),
        (["list", "--since", "yesterday"], "--since: "),
        (["list", "--since", "٣d"], "--since: "),
        (["purge", "--older-than", "7"], "--older-than: "),
        (["purge", "--older-than", "2026-11-22"], "--older-than: "),
        (["purge", "--state", "queued", "--yes"], "--state: "),
        (["replay"], "name the deliveries"),
        (["replay", "x", "--dead"], "name the deliveries"),
        (["replay", "x", "--room", ROOM], "name the deliveries"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(cli: Cli, arguments: list[str], says: str) -> None:
    put_dead(cli, "x")
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"flowbridge: {says}") or says in done.err
    assert len(done.err.splitlines()) == 1
    assert cli.list("--state", "dead") == ["x"]


# refused calls, what an event waits for, and rooms by an alias


def test_refused_calls_are_listed_shown_and_purged(cli: Cli) -> None:
    put_dead(cli, "dead")
    with working(cli) as connection:
        refused.write(connection, [call("a", "key k1", number=7)], [])
    assert cli.list() == ["refused-a", "dead"]
    assert cli.list("--state", "refused") == ["refused-a"]
    line = next(line for line in cli("list").out.splitlines() if line.startswith("refused-a"))
    assert line.split()[2:] == ["refused", "m.room.message", "1970-01-01T00:00:01Z", "k1", "7", "no"]
    shown = cli("show", "refused-a")
    assert shown.code == 0, shown.err
    assert "error        400 M_BAD_JSON no" in shown.out
    assert "history" not in shown.out
    assert cli("show", "refused-b").err == "flowbridge: there is no delivery refused-b\n"
    replayed = cli("replay", "refused-a")
    assert (replayed.code, replayed.err) == (
        1,
        "flowbridge: refused-a is a call that was refused, of which nothing is kept: send it again\n",
    )
    assert cli("purge", "--state", "refused", "--older-than", "1h", "--yes").out == "1 deliveries are deleted\n"
    assert cli.list() == ["dead"]


def test_queued_event_says_what_it_waits_for(cli: Cli) -> None:
    history = json.dumps([{"at": 1, "ms": 1, "status": 502, "error": "bad gateway"}])
    put(cli, "first", history=history)
    put(cli, "second")
    reasons = {one["delivery_id"]: one["waiting"] for one in cli.json("list")["deliveries"]}
    assert reasons["first"] == {"reason": "the last attempt failed: bad gateway"}
    assert reasons["second"] == {
        "reason": "an older event of this room first; of the first one: its last attempt failed",
        "behind": "first",
    }
    assert "waits: the last attempt failed: bad gateway" in cli("list").out
    assert "waiting      the last attempt failed: bad gateway" in cli("show", "first").out


def test_list_is_chosen_by_the_key_and_by_a_text(cli: Cli) -> None:
    put(cli, "a", caller_key="order-17", content='{"body": "The Backup"}')
    put(cli, "b", content='{"body": "something else"}')
    assert cli.list("--key", "order-17") == ["a"]
    assert cli.list("--q", "backup") == ["a"]
    assert cli.list("--q", "backup", "--key", "order-18") == []
    done = cli("list", "--q", "x")
    assert (done.code, done.err) == (2, "flowbridge: --q: it takes 2 to 200 characters to search for, not 1\n")


def test_content_that_is_not_kept_is_said_and_not_sent_again(cli: Cli) -> None:
    put(cli, "a", content="", state="sent", settled_at=1)
    assert "its content is not kept any more (FLOWBRIDGE_KEEP_CONTENT_DAYS)" in cli("show", "a").out
    done = cli("replay", "a")
    assert done.code == 1
    assert done.err.startswith("flowbridge: a cannot be sent again: its content is not kept any more")
    assert cli.list("--state", "queued") == []


@pytest.mark.parametrize(
    ("room", "said"),
    [
        ("lobby", "--room: 'lobby' is not a room: a room id begins with '!', an alias with '#'"),
        ("#lobby", "--room: '#lobby' is not a room alias: it has the form #name:server"),
    ],
)
def test_room_that_is_none_is_said_to_be_none(cli: Cli, room: str, said: str) -> None:
    put_dead(cli, "a")
    assert cli("list", "--room", room).err == f"flowbridge: {said}\n"


def test_room_of_version_12_has_no_server(cli: Cli) -> None:
    put(cli, "a", room="!kYmM3pLCrX")
    put(cli, "b")
    assert cli.list("--room", "!kYmM3pLCrX") == ["a"]


def test_alias_is_what_the_homeserver_said_last_while_it_cannot_be_asked(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASE_URL", "http://127.0.0.1:9")  # nothing is there
    monkeypatch.setenv("ACCESS_TOKEN", "syt_bot_token")
    put(cli, "a", room=ROOM)
    put(cli, "b", room=OTHER)
    with working(cli) as connection:
        resolved.note(connection, "joined|@bot:hs|#ops:hs", ROOM, 1)
        resolved.note(connection, "found|@bot:hs|#ops:hs", ROOM, 1)
        resolved.note(connection, "joined|@bot:hs|#OPS:hs", OTHER, 1)
    assert cli.list("--room", "#ops:hs") == ["a"]
    done = cli("list", "--room", "#nowhere:hs")
    assert done.code == 2
    assert done.err.startswith("flowbridge: --room: where #nowhere:hs leads is not known (")
    assert done.err.endswith("): name the room's id, as `flowbridge deliveries list` shows it\n")


def test_alias_is_what_the_homeserver_says(cli: Cli, monkeypatch: pytest.MonkeyPatch, upstream: Upstream) -> None:
    monkeypatch.setenv("BASE_URL", upstream.url)
    monkeypatch.setenv("ACCESS_TOKEN", "syt_bot_token")
    upstream.always(scripted.answer({"room_id": ROOM, "servers": []}), at="/directory/room/")
    put_dead(cli, "a", room=ROOM)
    put_dead(cli, "b", room=OTHER)
    assert cli.list("--room", "#ops:upstream") == ["a"]
    assert cli("replay", "--dead", "--room", "#ops:upstream").out == "1 of 1 dead letters are queued\n"
    done = cli("purge", "--queued", "--room", "#ops:upstream", "--yes")
    assert done.out == "1 queued events are deleted\n"
    assert cli.list() == ["b"]


def test_alias_without_an_account_says_what_to_do(cli: Cli) -> None:
    put_dead(cli, "a")
    done = cli("list", "--room", "#ops:hs")
    assert done.err == (
        "flowbridge: --room: where #ops:hs leads is not known (the bridge has no account to ask with: set "
        "ACCESS_TOKEN): name the room's id, as `flowbridge deliveries list` shows it\n"
    )
