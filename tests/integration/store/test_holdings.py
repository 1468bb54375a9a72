"""flowbridge.store.holdings, on each engine: which caller holds how much, and what is deleted before its time."""

from collections import Counter
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, Engine, select, update

from flowbridge.store import holdings
from flowbridge.store.outbox import ROW_BYTES
from flowbridge.store.tables import outbox as events
from tests.integration.store.events import LANE, OTHER, put

WIDE = "\U0001f600" * 1_000  # 4,000 bytes


@pytest.fixture
def filled(engine: Engine) -> Engine:
    """Three callers in two lanes, in every state, in no order."""
    with engine.begin() as connection:
        for number in range(7):
            for lane in (OTHER, LANE):
                put(connection, f"user-{lane}-{number}", lane=lane)
                put(connection, f"key-{lane}-{number}", lane=lane, api_key="key", content=f'{{"body":"{WIDE}"}}')
            put(connection, f"dead-{number}", state="dead", settled_at=number, api_key="key", request=WIDE)
            put(connection, f"sent-{number}", state="sent", settled_at=9 - number, api_key="other", history="[1]")
    return engine


def add_up(
    connection: Connection, work: Callable[..., holdings.Piece], limit: int, last: int | None = None
) -> dict[str, tuple[int, int]]:
    rows: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    after: holdings.Place | None = ("", 0)
    while after is not None:
        piece = work(connection, after, holdings.newest(connection) if last is None else last, limit)
        for _, caller, number, size in piece.held:
            rows[caller] += number
            sizes[caller] += size
        after = piece.end
    return {caller: (number, sizes[caller]) for caller, number in rows.items()}


@pytest.mark.parametrize("limit", [1, 3, 4, 1_000])
def test_pieces_of_any_size_add_up_to_the_same(filled: Engine, limit: int) -> None:
    small = ROW_BYTES + len("{}") + len("[]")
    with filled.connect().execution_options(reads=True) as connection:
        assert add_up(connection, holdings.queued, limit) == {
            "account": (14, 14 * small),
            "key": (14, 14 * (small - 2 + len(f'{{"body":"{WIDE}"}}'.encode()))),
        }
        assert add_up(connection, holdings.dead, limit) == {"key": (7, 7 * (small + 4_000))}
        assert add_up(connection, holdings.sent, limit) == {"other": (7, 7 * (small + 1))}


def test_what_comes_meanwhile_is_not_counted(filled: Engine) -> None:
    with filled.begin() as connection:
        last = holdings.newest(connection)
        for state in ("queued", "dead", "sent"):
            put(connection, f"late-{state}", state=state, settled_at=None if state == "queued" else 1, api_key="late")
        for work in (holdings.queued, holdings.dead, holdings.sent):
            assert "late" not in add_up(connection, work, 5, last)
            assert "late" in add_up(connection, work, 5)


def test_empty_store_holds_nothing(engine: Engine) -> None:
    with engine.connect().execution_options(reads=True) as connection:
        assert holdings.newest(connection) == 0
        for work in (holdings.queued, holdings.dead, holdings.sent):
            assert add_up(connection, work, 5) == {}


def test_oldest_settled_events_of_a_caller_go_as_far_as_they_are_asked_for(filled: Engine) -> None:
    def names(connection: Connection, ids: list[int]) -> list[str]:
        found = dict(tuple(row) for row in connection.execute(select(events.c.id, events.c.delivery)))
        return [found[id_] for id_ in ids]

    with filled.begin() as connection:
        sent = holdings.oldest(connection, "other", "sent")
        assert names(connection, [id_ for id_, _ in sent]) == [f"sent-{number}" for number in range(6, -1, -1)]
        assert holdings.oldest(connection, "key", "sent") == []
        dead = holdings.oldest(connection, "key", "dead", 10_000)
        assert names(connection, [id_ for id_, _ in dead]) == ["dead-0", "dead-1"]
        assert len(holdings.oldest(connection, "key", "dead", 1)) == 1
        connection.execute(update(events).where(events.c.delivery == "dead-0").values(state="queued"))  # a replay
        assert holdings.drop(connection, [id_ for id_, _ in dead], "dead") == 1
        assert holdings.drop(connection, [id_ for id_, _ in sent], "sent") == 7
