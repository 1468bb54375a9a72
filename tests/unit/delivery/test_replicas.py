"""What replicas tell each other: to whom, of what, and in messages that PostgreSQL takes."""

import json
from typing import Any

import pytest

from flowbridge.delivery.pending import Outcome
from flowbridge.delivery.replicas import MAX_AWAITED, Replicas
from flowbridge.store import notifications


class _Wire:
    """Stands in for PostgreSQL: what is sent arrives at once."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.new: list[str] = []
        self.ended: list[tuple[str, Outcome]] = []

    def notify(self, _: Any, channel: str, message: str) -> None:
        self.sent.append((channel, message))

    def replicas(self, owner: str = "me") -> Replicas:
        return Replicas(owner, new=self.new.append, ended=lambda *each: self.ended.append(each))


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> _Wire:
    wire = _Wire()
    monkeypatch.setattr(notifications, "notify", wire.notify)
    return wire


def outcome(delivery: str, **values: Any) -> dict[str, Any]:
    return {"b_delivery": delivery, "b_state": "sent", "b_event_id": f"${delivery}", "b_error": None, **values}


def asking(replicas: Replicas, *deliveries: str, lane: str = "lane", by: str = "other") -> None:
    """Another replica has added these events, for which callers wait there."""
    replicas._hear(json.dumps({"from": by, "new": [[lane, deliveries]]}))


def tell_ended(replicas: Replicas, *deliveries: str, settled: set[str] | None = None) -> None:
    outcomes = [outcome(each) for each in deliveries]
    replicas.tell_ended(None, set(deliveries) if settled is None else settled, outcomes)  # type: ignore[arg-type]


def test_outcome_is_told_to_who_asked(wire: _Wire) -> None:
    replicas = wire.replicas()
    asking(replicas, "one")
    assert wire.new == ["lane"]
    assert (replicas.is_awaited("one"), replicas.is_awaited("two")) == (True, False)
    tell_ended(replicas, "one", "two")
    ((channel, message),) = wire.sent
    assert channel == "flowbridge_other"
    wire.replicas("other")._hear(message)
    assert wire.ended == [("one", Outcome("sent", "$one"))]


def test_error_is_told(wire: _Wire) -> None:
    replicas = wire.replicas()
    asking(replicas, "one")
    dead = outcome("one", b_state="dead", b_event_id=None, b_error='{"errcode": "M_X"}')
    replicas.tell_ended(None, {"one"}, [dead])  # type: ignore[arg-type]
    wire.replicas("other")._hear(wire.sent[0][1])
    assert wire.ended == [("one", Outcome("dead", None, {"errcode": "M_X"}))]


def test_outcome_of_a_lane_that_was_lost_is_not_told(wire: _Wire) -> None:
    replicas = wire.replicas()
    asking(replicas, "one")
    tell_ended(replicas, "one", settled=set())
    assert wire.sent == []


def test_outcome_is_told_again_until_its_commit_is_done(wire: _Wire) -> None:
    replicas = wire.replicas()
    asking(replicas, "one")
    tell_ended(replicas, "one")
    tell_ended(replicas, "one")
    assert len(wire.sent) == 2
    replicas.forget([outcome("one")])
    assert not replicas.is_awaited("one")


def test_many_outcomes_are_told_in_messages_that_postgresql_takes(wire: _Wire) -> None:
    replicas = wire.replicas()
    names = [f"delivery-{number}" for number in range(1_000)]
    asking(replicas, *names)
    tell_ended(replicas, *names)
    assert len(wire.sent) > 1
    assert all(len(message.encode()) < 8_000 for _, message in wire.sent)
    other = wire.replicas("other")
    for _, message in wire.sent:
        other._hear(message)
    assert [name for name, _ in wire.ended] == names


def test_outcome_that_no_message_holds_is_left_to_be_looked_for(wire: _Wire) -> None:
    replicas = wire.replicas()
    asking(replicas, "one", "two")
    long = outcome("one", b_error=json.dumps({"error": "x" * 9_000}))
    replicas.tell_ended(None, {"one", "two"}, [long, outcome("two")])  # type: ignore[arg-type]
    ((_, message),) = wire.sent
    assert [name for name, *_ in json.loads(message)["ended"]] == ["two"]


def test_what_is_awaited_is_bounded(wire: _Wire) -> None:
    replicas = wire.replicas()
    asking(replicas, *(str(number) for number in range(MAX_AWAITED + 1)))
    assert not replicas.is_awaited("0")
    assert replicas.is_awaited(str(MAX_AWAITED))
