"""Apprise's senders for webhooks run unchanged against hooks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from apprise import Apprise, NotifyFormat, NotifyType
from apprise.plugins.matrix import NotifyMatrix, base
from apprise.plugins.slack import NotifySlack

from tests.http.conftest import Bridge
from tests.http.hooked import hook, hooked
from tests.upstream import Rooms, Upstream

# nio, which Apprise loads, has not followed Python yet.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

TOKEN = "TIiajkdnlazkcOXrIdevi7qwertz"  # Apprise takes letters and digits alone in Slack's place
BODY = "**Disk full** on `web-1`: <95 %>"


@pytest.fixture
def bridge(upstream: Upstream, rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridge]:
    for plugin in (NotifyMatrix, NotifySlack):
        monkeypatch.setattr(plugin, "request_rate_per_sec", 0)
    with hooked(upstream, tmp_path, hook("apprise", verification={"secret": TOKEN})) as bridge:
        yield bridge


def said(bridge: Bridge, rooms: Rooms, url: str, body: str, format_: NotifyFormat) -> dict[str, Any]:
    apprise = Apprise()
    assert apprise.add(url)
    assert apprise.notify(body=body, title="Alarm", body_format=format_, notify_type=NotifyType.WARNING)
    bridge.wait_until_idle()
    (event,) = rooms.events
    found: dict[str, Any] = event.content
    return found


@pytest.mark.parametrize("mode", ["hookshot", "matrix", "slack"])
@pytest.mark.parametrize("format_", [NotifyFormat.TEXT, NotifyFormat.MARKDOWN, NotifyFormat.HTML])
def test_matrix_webhooks(bridge: Bridge, rooms: Rooms, mode: str, format_: NotifyFormat) -> None:
    address = urlsplit(bridge.url).netloc
    body = "<b>Disk full</b> on web-1" if format_ == NotifyFormat.HTML else BODY
    found = said(bridge, rooms, f"matrix://{TOKEN}@{address}?mode={mode}", body, format_)
    assert "Disk full" in found["body"]
    assert "web-1" in found["body"]
    assert "Alarm" in found["body"]
    assert "<95" not in found.get("formatted_body", "")
    assert found["m.mentions"] == {}


@pytest.mark.parametrize("format_", [NotifyFormat.TEXT, NotifyFormat.MARKDOWN])
def test_t2bot(bridge: Bridge, rooms: Rooms, monkeypatch: pytest.MonkeyPatch, format_: NotifyFormat) -> None:
    """It has t2bot's address in its code, and its tokens have 64 characters."""
    post = base.requests.post
    elsewhere = f"{bridge.url}/api/v1/matrix/hook/{TOKEN}"
    monkeypatch.setattr(base.requests, "post", lambda url, **more: post(elsewhere, **more))
    found = said(bridge, rooms, f"matrix://{'a' * 64}?mode=t2bot", BODY, format_)
    assert "Disk full" in found["body"]


@pytest.mark.parametrize("format_", [NotifyFormat.TEXT, NotifyFormat.MARKDOWN])
def test_slack(bridge: Bridge, rooms: Rooms, monkeypatch: pytest.MonkeyPatch, format_: NotifyFormat) -> None:
    monkeypatch.setattr(NotifySlack, "webhook_url", f"{bridge.url}/services")
    found = said(bridge, rooms, f"slack://T1JJ3T3L2/A1BRTD4JD/{TOKEN}", BODY, format_)
    assert "Disk full" in found["body"]
    assert "<95" not in found.get("formatted_body", "")


def test_wrong_token_is_a_failure(bridge: Bridge, rooms: Rooms) -> None:
    apprise = Apprise()
    assert apprise.add(f"matrix://{TOKEN}x@{urlsplit(bridge.url).netloc}?mode=hookshot")
    assert not apprise.notify(body="x")
    assert not rooms.events
