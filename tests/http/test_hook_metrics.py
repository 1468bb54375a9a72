"""What /metrics tells of hooks, and what it does not: neither which there are, nor what strangers write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.conftest import Bridge, as_caller
from tests.http.hooked import PATH, hooked, path_of, signed, tell
from tests.http.test_health import figures
from tests.upstream import Rooms, Upstream

Counted = dict[tuple[str, str], float]


@pytest.fixture
def bridge(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> Iterator[Bridge]:
    with hooked(upstream, tmp_path) as bridge:
        yield bridge


@pytest.fixture
def reader(bridge: Bridge) -> Iterator[httpx.Client]:
    with as_caller(bridge) as caller:
        yield caller


def requests(reader: httpx.Client) -> Counted:
    """By source and outcome."""
    found = {name: value for name, value in figures(reader).items() if name[0] == "flowbridge_hook_requests_total"}
    return {(dict(labels)["source"], dict(labels)["outcome"]): value for (_, labels), value in found.items()}


def grown(before: Counted, now: Counted) -> Counted:
    """Other tests of this process have counted before."""
    return {key: value - before.get(key, 0) for key, value in now.items() if value != before.get(key, 0)}


PUSH: dict[str, Any] = {"zen": "Keep it logically awesome.", "hook_id": 1}


def test_requests_are_counted_by_source_and_outcome(bridge: Bridge, reader: httpx.Client) -> None:
    before = requests(reader)
    assert tell(bridge, {"text": "counted"}).status == 200
    assert tell(bridge, {"text": "counted"}).headers["idempotent-replayed"] == "true"
    assert tell(bridge, PUSH, "X-GitHub-Event: ping").status == 200
    assert tell(bridge, b"").status == 400
    assert tell(bridge, b"{}", "Content-Type: application/xml").status == 415
    assert tell(bridge, b"ok", "Content-Encoding: br").status >= 400
    assert grown(before, requests(reader)) == {
        ("generic", "accepted"): 1,
        ("generic", "repeated"): 1,
        ("github", "nothing"): 1,
        ("auto", "invalid"): 3,
    }


def test_labels_tell_nothing_of_strangers_and_to_strangers(bridge: Bridge, reader: httpx.Client) -> None:
    before = requests(reader)
    for path in (
        "/hooks/evil-name/fh_x",
        "/hooks/any/fh_guess",
        "/webhook/fh_y",
        "/services/a/b/fh_z",
        "/hooks/signed",
    ):
        assert tell(bridge, b"{}", signed(b"{}", "a wrong one"), "X-GitHub-Event: push", path=path).status == 401
    assert grown(before, requests(reader)) == {("unknown", "refused"): 5}
    assert "evil" not in reader.get("/metrics").text


def test_failed_templates_are_counted(bridge: Bridge, reader: httpx.Client) -> None:
    name = ("flowbridge_hook_template_failures_total", (("source", "generic"),))
    before = figures(reader).get(name, 0)
    assert tell(bridge, {"text": "fine"}, path=PATH).status == 200
    assert tell(bridge, {"text": "fails"}, path=path_of("failing")).status == 200
    assert figures(reader)[name] == before + 1


def test_our_own_trouble_is_no_ones_mistake(upstream: Upstream, tmp_path: Path) -> None:
    with hooked(upstream, tmp_path, max_database_bytes=1) as bridge, as_caller(bridge) as reader:
        before = requests(reader)
        assert tell(bridge, {"text": "no room"}).status == 503
        assert grown(before, requests(reader)) == {("auto", "unavailable"): 1}
