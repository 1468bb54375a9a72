"""What alerting tools send, through their hooks into a room: with their own headers, again, and as stories."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from flowbridge.sources import BY_NAME
from tests.http.conftest import ROOM, Answer, Bridge
from tests.http.hooked import SECRET, hooked, tell
from tests.unit.sources.test_alerting import GOLDEN, NAMES, STORIES, body
from tests.upstream import Rooms, Upstream

# A hook for each test: what was told to one, and its stories, are nothing to another.
HOOKS = [
    {"name": f"test-{number}", "room": ROOM, "verification": {"secret": f"{SECRET}-{number}"}} for number in range(50)
]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def shared_hooked(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with hooked(shared_upstream, tmp_path_factory.mktemp("alerting"), *HOOKS) as bridge:
        yield bridge


@dataclass(frozen=True)
class Told:
    """A hook that finds out by itself who tells it something."""

    bridge: Bridge
    path: str

    def __call__(self, payload: str, **headers: str) -> Answer:
        """Its message is in the room then, or it says nothing."""
        given = {"Content-Type": "application/json", **headers}
        lines = (f"{name}: {value}" for name, value in given.items())
        answer = tell(self.bridge, payload.encode(), *lines, path=self.path)
        assert answer.status == 200, answer
        self.bridge.wait_until(answer.json()["delivery_id"], "sent")
        return answer


@pytest.fixture
def hook(shared_hooked: Bridge, upstream: Upstream, rooms: Rooms) -> Iterator[Told]:
    number = next(_numbers)
    yield Told(shared_hooked, f"/hooks/test-{number}/{SECRET}-{number}")
    upstream.reset()
    shared_hooked.clear()


def contents(rooms: Rooms) -> list[dict[str, Any]]:
    return [event.content for event in rooms.events]


@pytest.mark.parametrize("name", NAMES)
def test_sample_is_in_the_room_as_it_was_looked_at(hook: Told, rooms: Rooms, name: str) -> None:
    source = BY_NAME[name]
    hook(json.dumps(source.sample), **source.sample_headers)
    (content,) = contents(rooms)
    assert f"{content['body']}\n" == (GOLDEN / name / "sample.txt").read_text()
    assert f"{content['formatted_body']}\n" == (GOLDEN / name / "sample.html").read_text()


@pytest.mark.parametrize("name", ["cloudevents", "pagerduty", "sns"])
def test_same_delivery_is_told_once_however_it_differs(hook: Told, rooms: Rooms, name: str) -> None:
    source = BY_NAME[name]
    first = hook(json.dumps(source.sample), **source.sample_headers)
    again = hook(json.dumps(source.sample, indent=1), **source.sample_headers)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["delivery_id"] == first.json()["delivery_id"]
    assert len(contents(rooms)) == 1


@pytest.mark.parametrize("tool", STORIES)
def test_story_is_told_in_one_message(hook: Told, rooms: Rooms, tool: str) -> None:
    """What fires already only edits the message; so does the end."""
    headers = {"Sentry-Hook-Resource": "issue", "Sentry-Hook-Timestamp": "1588082166"} if tool == "sentry" else {}
    for number, (text, _, _, _) in enumerate(STORIES[tool]):
        for name in ("01BZYIL05THJDFF2Y08X9SVMTU", "e288882d-4281-5be4-8fde-dccc11c8cb01"):
            text = text.replace(name, f"delivery {number}")
        hook(text, **headers)
    first, *edits = rooms.events
    assert first.content["msgtype"] == "m.text"
    assert [edit.content["m.relates_to"] for edit in edits] == [
        {"rel_type": "m.replace", "event_id": first.event_id} for _ in STORIES[tool][1:]
    ]
    title = STORIES[tool][-1][1]
    assert edits[-1].content["m.new_content"]["body"].partition("\n")[0] == title


def test_new_alert_of_a_group_is_a_new_message(hook: Told, rooms: Rooms) -> None:
    names = ("1-firing-two", "2-one-of-two-resolved", "3-new-firing-in-the-same-group", "4-all-resolved")
    for name in names:
        hook(body(f"alertmanager/real-0.25-{name}"))
    first, edit, second, last = rooms.events
    assert edit.content["m.relates_to"]["event_id"] == first.event_id
    assert "m.relates_to" not in second.content
    assert second.content["msgtype"] == "m.text"
    assert last.content["m.relates_to"]["event_id"] == second.event_id


def test_repeat_and_the_other_one_of_a_pair_say_nothing(hook: Told, rooms: Rooms) -> None:
    text = body("alertmanager/real-0.25-1-firing-two")
    hook(text)
    hook(text.replace("http://vm:18766", "http://other:9093"))
    assert len(contents(rooms)) == 1


def test_late_message_overwrites_nothing(hook: Told, rooms: Rooms) -> None:
    hook(body("alertmanager/real-0.25-1-firing-two"))
    hook(body("alertmanager/real-0.25-4-all-resolved"))
    hook(body("alertmanager/real-0.25-2-one-of-two-resolved"))
    assert [content["body"].partition("\n")[0] for content in contents(rooms)] == [
        "🔥 HostDown: firing 2",
        "* ✅ HostDown: resolved 3",
    ]


def test_alert_that_began_before_another_ended_is_told(hook: Told, rooms: Rooms) -> None:
    """Its Prometheus' clock is behind, or could not reach Alertmanager at once."""
    hook(body("alertmanager/real-0.25-1-firing-two"))
    hook(body("alertmanager/real-0.25-4-all-resolved"))
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    payload["alerts"] = [
        {**payload["alerts"][1], "fingerprint": "f" * 16, "annotations": {"summary": "web-9 down"}},
    ]
    hook(json.dumps(payload))
    newest = contents(rooms)[-1]
    assert newest["body"].startswith("🔥 HostDown: firing\n\nweb-9 down\n")
    assert "m.relates_to" not in newest
