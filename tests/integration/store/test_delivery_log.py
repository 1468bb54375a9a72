"""flowbridge.store.delivery_log: the delivery log's SQL, on both engines."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import Connection, Engine, event, insert, select, text, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from flowbridge.store import clock, delivery_log, leases, outbox, refused
from flowbridge.store.contents import Contents
from flowbridge.store.delivery_log import ALL, Selection, Whose
from flowbridge.store.tables import accounts, lanes, tokens
from flowbridge.store.tables import outbox as events
from tests.integration.store import events as rows
from tests.integration.store.test_refused import call
from tests.patience import PATIENCE

ROOM, OTHER_ROOM = "!room:example.org", "!other:example.org"
DEAD: dict[str, Any] = {
    "state": "dead",
    "error": '{"status": 403, "errcode": "M_FORBIDDEN", "error": "no"}',
    "settled_at": 2_000,
}
SENT: dict[str, Any] = {"state": "sent", "event_id": "$sent", "settled_at": 2_000}


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        yield connection


def put(connection: Connection, *deliveries: str, account: str = "alice-1", room: str = ROOM, **values: Any) -> None:
    rows_ = [rows.event(name, f"{account}|{room}", **values) for name in deliveries]
    assert outbox.insert_rows(connection, rows_) == set()


def know(connection: Connection, **users: str) -> None:
    """Accounts, by name (with `_` for `-`), and whose they are."""
    values = [{"account": name.replace("_", "-"), "user_id": user} for name, user in users.items()]
    connection.execute(insert(accounts), values)


def names(connection: Connection, selection: Selection = Selection(), limit: int = 100) -> list[str]:  # noqa: B008
    return [row["delivery"] for row in delivery_log.page(connection, selection, limit)[0]]


def history(row: dict[str, Any]) -> list[dict[str, Any]]:
    return list(json.loads(row["history"]))


# pages


def test_newest_is_first(connection: Connection) -> None:
    put(connection, "a", "b", "c")
    assert names(connection) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(states=("dead",)), ["dead"]),
        (Selection(states=("dead", "queued")), ["queued", "dead"]),
        (Selection(states=("sent", "dead", "queued")), ["queued", "sent", "dead"]),
        (Selection(room_id=OTHER_ROOM), ["sent"]),
        (Selection(event_type="m.room.topic"), ["queued"]),
        (Selection(since=200), ["queued", "sent"]),
        (Selection(until=200), ["dead"]),
        (Selection(since=100, until=101), ["dead"]),
        (Selection(states=("dead",), room_id=OTHER_ROOM), []),
        (Selection(names=("queued", "dead", "never")), ["queued", "dead"]),
        (Selection(names=("queued", "dead"), states=("sent", "dead")), ["dead"]),
        (Selection(room_id="'; DROP TABLE outbox; --"), []),
        (Selection(event_type="%"), []),
        (Selection(since=-(2**62), until=2**62), ["queued", "sent", "dead"]),
    ],
)
def test_selection_is_what_meets_all_that_is_given(
    connection: Connection, selection: Selection, expected: list[str]
) -> None:
    put(connection, "dead", accepted_at=100, **DEAD)
    put(connection, "sent", room=OTHER_ROOM, accepted_at=200, **SENT)
    put(connection, "queued", event_type="m.room.topic", accepted_at=300)
    assert names(connection, selection) == expected


def test_listed_row_names_its_user_and_holds_no_content(connection: Connection) -> None:
    know(connection, alice_1="@alice:example.org")
    put(connection, "known")
    put(connection, "unknown", account="nobody-1")
    unknown, known = delivery_log.page(connection, Selection(), 10)[0]
    assert (known["user_id"], unknown["user_id"]) == ("@alice:example.org", None)
    assert not known.keys() & {"content", "request", "history"}


@pytest.mark.parametrize("span", [None, 1, 2, 3, 7, 1_000])
@pytest.mark.parametrize("selection", [Selection(), Selection(room_id=ROOM), Selection(states=("dead",))], ids=str)
def test_pages_of_any_span_bring_everything_once(
    connection: Connection, selection: Selection, span: int | None
) -> None:
    expected = []
    for number in range(12):
        put(connection, f"gone-{number}")
        put(connection, f"other-{number}", room=OTHER_ROOM)
        put(connection, f"dead-{number}", **DEAD)
        expected += [f"dead-{number}"] if selection != Selection() else [f"other-{number}", f"dead-{number}"]
    connection.execute(text("DELETE FROM outbox WHERE delivery LIKE 'gone-%'"))
    found: list[str] = []
    before: int | None = None
    while True:
        page, before = delivery_log.page(connection, selection, 5, before, span)
        assert len(page) <= 5
        found += [row["delivery"] for row in page]
        if before is None:
            break
    assert found == expected[::-1]


def test_rows_that_come_meanwhile_do_not_move_the_pages(connection: Connection) -> None:
    put(connection, "a", "b", "c", "d")
    first, before = delivery_log.page(connection, Selection(), 2)
    put(connection, "e", "f")
    second, _ = delivery_log.page(connection, Selection(), 2, before)
    assert [row["delivery"] for row in (*first, *second)] == ["d", "c", "b", "a"]


def test_empty_log_has_an_empty_page_and_no_next(connection: Connection) -> None:
    assert delivery_log.page(connection, Selection(room_id=ROOM), 10, None, 10) == ([], None)


def test_dead_letters_are_found_by_their_index(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, *(f"sent-{number}" for number in range(3_000)), **SENT)
        put(connection, "dead", **DEAD)
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE outbox"))
    with engine.connect() as connection, said(connection) as statements:
        delivery_log.page(connection, Selection(states=("dead",)), 50)
        explain = "EXPLAIN " if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
        statement, parameters = statements[-1]
        plan = " ".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
    assert "outbox_dead" in plan
    assert "'dead'" in statement, "a plan for any state, as PostgreSQL makes it in the end, could not use the index"


@contextmanager
def said(connection: Connection) -> Iterator[list[tuple[str, Any]]]:
    statements: list[tuple[str, Any]] = []

    def hear(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        statements.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", hear)
    yield statements
    event.remove(connection, "before_cursor_execute", hear)


# whose they are


@pytest.fixture
def peopled(connection: Connection) -> Connection:
    """Alice on two devices, Bob, and two keys that act as the bot."""
    know(connection, alice_1="@alice:hs", alice_2="@alice:hs", bob_1="@bob:hs", bot_1="@bot:hs")
    put(connection, "alice-phone", account="alice-1", **DEAD)
    put(connection, "alice-desk", account="alice-2", **DEAD)
    put(connection, "bob", account="bob-1", **DEAD)
    put(connection, "key-one", account="bot-1", api_key="one", **DEAD)
    put(connection, "key-two", account="bot-1", api_key="two", **DEAD)
    return connection


@pytest.mark.parametrize(
    ("whose", "expected"),
    [
        (ALL, ["alice-phone", "alice-desk", "bob", "key-one", "key-two"]),
        (Whose(user_id="@alice:hs"), ["alice-phone", "alice-desk"]),
        (Whose(user_id="@bob:hs"), ["bob"]),
        (Whose(user_id="@bot:hs"), ["key-one", "key-two"]),
        (Whose(user_id="@nobody:hs"), []),
        (Whose(user_id=""), []),
        (Whose(api_key="one"), ["key-one"]),
        (Whose(api_key=""), []),
        (Whose(user_id="@alice:hs", api_key="one"), []),
    ],
)
def test_only_ones_own_are_seen_replayed_and_removed(peopled: Connection, whose: Whose, expected: list[str]) -> None:
    every = names(peopled)[::-1]
    assert names(peopled, Selection(whose))[::-1] == expected
    assert [name for name in every if delivery_log.get(peopled, name, whose)] == expected
    assert [name for name in every if delivery_log.replay(peopled, name, f"txn-{name}", "me", whose=whose)] == expected
    with_state = select(events.c.delivery).where(events.c.state == "queued").order_by(events.c.id)
    assert list(peopled.scalars(with_state)) == expected
    peopled.execute(events.update().values(state="dead"))
    assert [name for name in every if delivery_log.remove(peopled, name, whose)] == expected


# one of them


def test_all_is_known_of_one(connection: Connection) -> None:
    know(connection, alice_1="@alice:hs")
    put(connection, "a", content='{"a":1}', request="came so", history="[1]")
    found = delivery_log.get(connection, "a")
    assert found is not None
    assert {name: found[name] for name in ("content", "request", "history", "user_id", "account")} == {
        "content": '{"a":1}', "request": "came so", "history": "[1]", "user_id": "@alice:hs", "account": "alice-1",
    }  # fmt: skip
    assert delivery_log.get(connection, "b") is None


@pytest.mark.parametrize(("was", "event_id"), [(DEAD, None), (SENT, "$sent")])
def test_replayed_row_goes_to_the_tail_under_a_new_txn_id(
    connection: Connection, was: dict[str, Any], event_id: str | None
) -> None:
    attempt = {"at": 1, "ms": 2, "status": 403}
    put(connection, "a", accepted_at=1_000, attempts=3, idem="i", txn_id="old", history=json.dumps([attempt]), **was)
    put(connection, "b")
    started = clock.now_ms()
    assert delivery_log.replay(connection, "a", "new", "@alice:hs")
    assert [row.delivery for row in outbox.fetch(connection, f"alice-1|{ROOM}")] == ["b", "a"]
    row = delivery_log.get(connection, "a")
    assert row is not None
    assert (row["state"], row["txn_id"], row["attempts"], row["idem"]) == ("queued", "new", 0, "i")
    assert (row["event_id"], row["error"], row["settled_at"]) == (None, None, None)
    assert row["accepted_at"] >= started
    first, second = history(row)
    assert first == attempt
    replayed = {"by": "@alice:hs", "state": was["state"], "txn_id": "old", "accepted_at": 1_000}
    assert second["replayed"] == (replayed if event_id is None else {**replayed, "event_id": event_id})
    assert second["at"] >= started


def test_replay_makes_the_lane_known_to_workers(connection: Connection) -> None:
    put(connection, "a", **DEAD)
    assert leases.claim(connection, "me", 10, 1_000) == []
    delivery_log.replay(connection, "a", "new", "me")
    (claim,) = leases.claim(connection, "me", 10, 1_000)
    assert [(row.delivery, row.txn_id) for row in claim.rows] == [("a", "new")]
    assert json.loads(claim.rows[0].history)[-1]["replayed"]["by"] == "me"


def test_queued_or_unknown_row_is_not_replayed(connection: Connection) -> None:
    put(connection, "a", txn_id="old")
    assert delivery_log.replay(connection, "a", "new", "me") is None
    assert delivery_log.replay(connection, "b", "new", "me") is None
    row = delivery_log.get(connection, "a")
    assert row is not None
    assert (row["txn_id"], history(row)) == ("old", [])
    assert connection.execute(select(lanes)).all() == []


def test_replay_by_another_device_of_the_user_takes_that_device(connection: Connection) -> None:
    put(connection, "a", **DEAD)
    put(connection, "of-a-key", api_key="one", **DEAD)
    for name in ("a", "of-a-key"):
        again = delivery_log.replay(connection, name, f"new-{name}", "@alice:hs", account="alice-2")
        assert again is not None
        assert again["lane"] == (f"alice-2|{ROOM}" if name == "a" else f"alice-1|{ROOM}")
    found = {claim.fence.lane: (claim.account, claim.rows[0].delivery) for claim in rows.claim(connection)}
    assert found == {f"alice-2|{ROOM}": ("alice-2", "a"), f"alice-1|{ROOM}": ("alice-1", "of-a-key")}


def test_history_of_many_replays_stays_short(connection: Connection) -> None:
    put(connection, "a", **DEAD)
    for number in range(outbox.HISTORY + 5):
        assert delivery_log.replay(connection, "a", f"txn-{number}", str(number))
        connection.execute(events.update().values(state="dead", settled_at=1))
    row = delivery_log.get(connection, "a")
    assert row is not None
    assert [entry["replayed"]["by"] for entry in history(row)] == [str(n) for n in range(5, outbox.HISTORY + 5)]


@rows.only_postgresql  # SQLite has one writer at a time
def test_two_replays_at_once_queue_it_once(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "a", **DEAD)

    def second() -> dict[str, Any] | None:
        with engine.begin() as connection:
            return delivery_log.replay(connection, "a", "second", "second")

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as connection:
            assert delivery_log.replay(connection, "a", "first", "first") is not None
            late = pool.submit(second)
            wait_until_blocked(engine)
        assert late.result(PATIENCE) is None
    with engine.connect() as connection:
        assert [(row["delivery"], row["txn_id"]) for row in connection.execute(select(events)).mappings()] == [
            ("a", "first")
        ]


def test_replay_that_is_done_again_with_the_same_transaction_id_is_one(connection: Connection) -> None:
    """Nobody heard of the first commit, and the event may have been sent again by now."""
    put(connection, "a", **DEAD)
    for state in ("queued", "sent"):
        for _ in range(2):
            assert delivery_log.replay(connection, "a", "again", "somebody") is not None
            row = delivery_log.get(connection, "a")
            assert row is not None
            assert (row["txn_id"], row["state"]) == ("again", state)
            assert len(json.loads(row["history"])) == 1
        connection.execute(update(events).values(state="sent", settled_at=1))
    assert delivery_log.replay(connection, "a", "once more", "somebody") is not None
    assert delivery_log.replay(connection, "nothing", "again", "somebody") is None


def test_newer_queued_state_is_found_without_a_walk_through_its_lane(engine: Engine) -> None:
    state = {"event_type": "m.room.topic", "state_key": ""}
    with engine.begin() as connection:
        put(connection, *(f"message-{number}" for number in range(3_000)))
        put(connection, "old", "new", **state)
        put(connection, "name", event_type="m.room.name", state_key="")
        put(connection, "of another", event_type="m.room.topic", state_key="key")
        put(connection, "sent", state="sent", settled_at=1, **state)
        put(connection, "elsewhere", room=OTHER_ROOM, **state)
        old = {"lane": f"alice-1|{ROOM}", "delivery": "old", **state}
        assert delivery_log.queued_behind(connection, old) == "new"
        assert delivery_log.queued_behind(connection, {**old, "delivery": "new"}) == "old"
        assert delivery_log.queued_behind(connection, {**old, "state_key": "nobody's"}) is None
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    asked: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda *said: asked.append((said[2], said[3])))
    with engine.connect().execution_options(reads=True) as connection:
        delivery_log.queued_behind(connection, old)
        explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
        plan = str(connection.exec_driver_sql(explain + asked[-1][0], asked[-1][1]).all())
    assert "outbox_queued_states" in plan, plan


def test_what_came_by_a_hook_is_found_by_its_name(engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, "of-ci", api_key="hook:ci")
        put(connection, "of-a-key", api_key="ci")
        put(connection, "of-another", api_key="hook:ci2")
        refused.write(connection, [call("ci", "key hook:ci"), call("key", "key ci")], [])
        rows, _ = delivery_log.page(connection, Selection(hook="ci"), 9)
        assert [row["delivery"] for row in rows] == ["of-ci"]
        assert [row["delivery"] for row in refused.page(connection, Selection(hook="ci"), 9)] == ["refused-ci"]


def wait_until_blocked(engine: Engine) -> None:
    blocked = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    deadline = time.monotonic() + PATIENCE
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.scalar(blocked):
            assert time.monotonic() < deadline, "the second replay does not wait for the first"


@pytest.mark.parametrize(("state", "removed"), [("sent", True), ("dead", True), ("queued", False)])
def test_only_settled_rows_are_removed(connection: Connection, state: str, removed: bool) -> None:
    put(connection, "a", state=state)
    assert delivery_log.remove(connection, "a") is removed
    assert (delivery_log.get(connection, "a") is None) is removed
    assert delivery_log.remove(connection, "b") is False


# for commands that take many


def test_extent_and_batches_stop_at_what_there_was(connection: Connection) -> None:
    put(connection, "a", "b", "c", **DEAD)
    put(connection, "queued")
    dead = Selection(states=("dead",))
    total, newest = delivery_log.extent(connection, dead)
    put(connection, "later", **DEAD)
    assert total == 3
    first = delivery_log.deliveries(connection, dead, 0, newest, 2)
    assert [name for _, name in first] == ["a", "b"]
    assert [name for _, name in delivery_log.deliveries(connection, dead, first[-1][0], newest, 2)] == ["c"]
    assert delivery_log.extent(connection, Selection(room_id="!none")) == (0, 0)


def test_settled_are_counted_by_state(connection: Connection) -> None:
    put(connection, "a", "b", state="dead", settled_at=100)
    put(connection, "c", state="sent", settled_at=100)
    put(connection, "d", state="sent", settled_at=200)
    put(connection, "e")
    assert delivery_log.settled(connection, 200) == {"dead": 2, "sent": 1}


# the key, a text, and the time


def test_event_is_found_by_the_key_that_its_caller_sent(connection: Connection) -> None:
    put(connection, "a", caller_key="order-17")
    put(connection, "b", caller_key="order-170")
    put(connection, "c", caller_key="order-17", room=OTHER_ROOM)
    put(connection, "d")
    assert names(connection, Selection(key="order-17")) == ["c", "a"]
    assert names(connection, Selection(key="order-17", room_id=ROOM)) == ["a"]
    assert names(connection, Selection(key="order-1%")) == []


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        ("backup", ["caps", "plain"]),
        ("BACKUP", ["caps", "plain"]),
        ("Geburtstagsgrüße", ["umlaut"]),
        ('say "hi"', ["quoted"]),
        ("two\nlines", ["lines"]),
        ("50%", ["percent"]),
        ("a_b", ["underscore"]),
        ("back\\slash", ["backslash"]),
        ("'; DROP TABLE outbox; --", []),
        ("%%", []),
    ],
)
@pytest.mark.parametrize("span", [None, 1, 3])
def test_event_is_found_by_a_part_of_its_content(
    connection: Connection, span: int | None, searched: str, expected: list[str]
) -> None:
    bodies = {
        "plain": "the backup is done",
        "caps": "BackUp failed",
        "umlaut": "viele Geburtstagsgrüße",
        "quoted": 'they say "hi"',
        "lines": "two\nlines",
        "percent": "50% full",
        "underscore": "a_b",
        "no underscore": "axb",
        "backslash": "back\\slash",
    }
    for name, body in bodies.items():
        put(connection, name, content=json.dumps({"body": body}, ensure_ascii=False))
    found, before = [], None
    while True:
        page, before = delivery_log.page(connection, Selection(text=searched), 2, before, span)
        found += [row["delivery"] for row in page]
        if before is None:
            break
    assert found == expected


def test_search_for_a_text_is_not_a_selection_to_act_on(connection: Connection) -> None:
    with pytest.raises(AssertionError):
        delivery_log.extent(connection, Selection(text="backup"))


@pytest.mark.parametrize("since", [0, 1, 7, 49, 99, 100])
def test_nothing_that_is_older_is_read(connection: Connection, since: int) -> None:
    """Replicas have clocks of their own, and ids may miss."""
    for number in range(100):
        put(connection, f"{number}", accepted_at=number * 1_000_000 + (number % 2) * clock.CLOCK_SKEW_MS)
    connection.execute(text("DELETE FROM outbox WHERE delivery IN ('3', '50', '51', '98')"))
    with said(connection) as statements:
        page, before = delivery_log.page(connection, Selection(since=since * 1_000_000), 1_000, span=1_000)
    assert [row["delivery"] for row in page] == [f"{n}" for n in range(99, since - 1, -1) if n not in (3, 50, 51, 98)]
    assert before is None
    assert len(statements) < 20, "by halves"


def test_filters_read_an_index_and_no_event_that_it_rules_out(engine: Engine) -> None:
    if engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL chooses by what the table holds")
    with engine.begin() as connection:
        for selection in (Selection(room_id=ROOM), Selection(event_type="x"), Selection(key="k", whose=Whose("@a:hs"))):
            with said(connection) as statements:
                delivery_log.page(connection, selection, 50, 1_000, 100)
            query, parameters = statements[-1]
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", parameters)]
            assert any("COVERING INDEX outbox_log" in line for line in plan), plan


# what an event waits for


def test_place_of_an_event_in_its_lane(connection: Connection) -> None:
    put(connection, "sent", **SENT)
    put(connection, "a", history='[{"at": 1, "error": "no"}]')
    put(connection, "b", "c")
    put(connection, "other", room=OTHER_ROOM)
    leases.mark_dirty(connection, [(f"alice-1|{ROOM}", "alice-1")])
    (claimed,) = rows.claim(connection, "me")
    found = delivery_log.standings(connection, ["sent", "a", "c", "other", "unknown"])
    assert found.keys() == {"a", "c", "other"}
    assert found["a"] == delivery_log.Standing(0, '[{"at": 1, "error": "no"}]', None, "a", "me")
    assert found["c"] == delivery_log.Standing(2, '[{"at": 1, "error": "no"}]', None, "a", "me")
    assert found["other"] == delivery_log.Standing(0, "[]", None, "other")
    leases.release(connection, [claimed.fence], 60_000)
    rests = delivery_log.standings(connection, ["a"])["a"]
    assert rests.owner is None
    assert rests.rests_until == rows.lane(connection, f"alice-1|{ROOM}").lease_until


def test_many_older_events_are_counted_up_to_a_bound(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_log, "MAX_OLDER", 3)
    put(connection, *(f"{number}" for number in range(10)))
    assert delivery_log.standings(connection, ["9"])["9"].before == 3


def test_account_whose_tokens_are_all_refused_is_locked_out(connection: Connection) -> None:
    put(connection, "a")
    assert not delivery_log.standings(connection, ["a"])["a"].is_locked_out, "nothing is known"
    for number, refused_at in enumerate((1_000, None)):
        token = {"token_hash": f"{number}", "account": "alice-1", "seen_at": 1, "refused_at": refused_at}
        connection.execute(insert(tokens), [token])
        assert delivery_log.standings(connection, ["a"])["a"].is_locked_out == (number == 0)


def test_content_that_is_not_kept_is_not_sent_again(connection: Connection) -> None:
    put(connection, "a", content="", **SENT)
    assert delivery_log.replay(connection, "a", "new", "me") is None
    assert delivery_log.get(connection, "a")["state"] == "sent"  # type: ignore[index]


def test_reading_is_broken_off_when_it_takes_too_long(engine: Engine) -> None:
    slow = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "postgresql": "SELECT pg_sleep(60)",
    }[engine.dialect.name]
    with engine.connect() as connection, pytest.raises(delivery_log.TooSlow):  # noqa: SIM117
        with delivery_log.at_most(0.05, connection):
            connection.execute(text(slow))
    with engine.connect() as connection, delivery_log.at_most(60, connection):
        assert connection.scalar(text("SELECT count(*) FROM outbox")) == 0
    with engine.connect() as connection, pytest.raises(OperationalError if is_sqlite(engine) else ProgrammingError):  # noqa: SIM117
        with delivery_log.at_most(60, connection):
            connection.execute(text("SELECT * FROM nowhere"))


def is_sqlite(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


# contents that are encrypted


def test_search_finds_texts_in_encrypted_contents_too(engine: Engine) -> None:
    contents = Contents()
    contents.unlock(Fernet.generate_key().decode())
    engine.update_execution_options(contents=contents)
    with engine.begin() as connection:
        for number in range(300):
            name = f"d{number}"
            text = json.dumps(
                {"body": f"Straße {'NEEDLE' if number % 100 == 7 else 'hay'} {number}"}, ensure_ascii=False
            )
            put(connection, name, content=contents.seal(text, name) if number % 2 else text)
        found = ["d207", "d107", "d7"]
        assert names(connection, Selection(text="needle")) == found
        assert names(connection, Selection(text="STRASSE")) == []
        assert len(names(connection, Selection(text="straße"), 1_000)) == 300
        pages, before = [], None
        while True:
            rows_, before = delivery_log.page(connection, Selection(text="Needle"), 2, before, span=40)
            pages += [row["delivery"] for row in rows_]
            if before is None:
                break
        assert pages == found
        assert all("sealed" not in row and "content" not in row for row in rows_)
        row = delivery_log.get(connection, "d7")
        assert row is not None
        assert json.loads(row["content"])["body"] == "Straße NEEDLE 7"


def test_replay_of_an_encrypted_content_stays_encrypted(engine: Engine) -> None:
    contents = Contents()
    contents.unlock(Fernet.generate_key().decode())
    engine.update_execution_options(contents=contents)
    with engine.begin() as connection:
        sealed = contents.seal('{"body":"x"}', "a")
        put(connection, "a", content=sealed, **DEAD)
        assert delivery_log.replay(connection, "a", "txn", "me") is not None
        assert connection.scalar(select(events.c.content)) == sealed
        row = outbox.fetch(connection, f"alice-1|{ROOM}")[0]
        assert (row.content, row.is_sealed) == (b'{"body":"x"}', True)
