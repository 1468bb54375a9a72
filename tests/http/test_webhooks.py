"""Requests to hooks: contract §6."""

from collections.abc import Iterator

import pytest

from tests.http.conftest import Bridge
from tests.http.hooked import hooked, tell
from tests.upstream import Rooms, Upstream


@pytest.fixture(scope="module")
def shared_hooked(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with hooked(shared_upstream, tmp_path_factory.mktemp("hooked")) as bridge:
        yield bridge


@pytest.fixture
def bridge(shared_hooked: Bridge, upstream: Upstream, rooms: Rooms) -> Iterator[Bridge]:
    yield shared_hooked
    upstream.reset()
    shared_hooked.clear()


def test_message_is_in_the_room(bridge: Bridge, rooms: Rooms) -> None:
    answer = tell(bridge, {"text": "backup done"})
    assert answer.status == 200, answer
    found = answer.json()
    assert found == {"ok": True, "delivery_id": answer.headers["flowbridge-delivery"]}
    bridge.wait_until(found["delivery_id"], "sent")
    assert [event.content for event in rooms.events] == [{"msgtype": "m.text", "body": "backup done", "m.mentions": {}}]
