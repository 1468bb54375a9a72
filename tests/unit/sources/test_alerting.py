"""Sources of alerting tools: what rooms read of recorded bodies, and the stories that these belong to."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flowbridge.rendering.webhooks import webhook
from flowbridge.sources import BY_NAME

PAYLOADS = Path(__file__).parents[2] / "payloads"
GOLDEN = Path(__file__).parent / "golden"
HEADERS: dict[str, dict[str, str]] = {}
RECORDED = [
    str(file.relative_to(PAYLOADS).with_suffix(""))
    for folder in ("alertmanager",)
    for file in sorted((PAYLOADS / folder).glob("*.json"))
]


def body(name: str) -> str:
    return (PAYLOADS / f"{name}.json").read_text()


def made(body: str, *, source: str = "auto", per: str = "notification", **headers: str) -> dict[str, Any]:
    given = {
        "source": source,
        "headers": {name.replace("_", "-"): value for name, value in headers.items()},
        "per": per,
        "template": None,
        "is_text": False,
        "plain": False,
    }
    found: dict[str, Any] = json.loads(webhook(body, given)[0])
    return found


def only(found: dict[str, Any]) -> dict[str, Any]:
    (message,) = found["messages"]
    assert isinstance(message, dict)
    return message


def golden(file: Path, text: str) -> None:
    """Compare with what was looked at; UPDATE_GOLDEN=1 writes it, to be looked at again."""
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert f"{text}\n" == file.read_text()


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_body_is_shown_as_it_was_looked_at(name: str) -> None:
    found = made(body(name), **HEADERS.get(name, {}))
    message = only(found)
    assert found["source"] == name.partition("/")[0]
    assert found["warnings"] == []
    golden(GOLDEN / f"{name}.html", message["html"])
    golden(GOLDEN / f"{name}.txt", message["body"])


HOST_DOWN = '{}:{alertname="HostDown"}'
WEB_1, WEB_2, WEB_3 = (
    "a040726554fc8521-1795998484939",
    "6024a9a3dba79094-1795998484939",
    "abe2cb07554e0d2b-1795998528998",
)


@pytest.mark.parametrize(
    ("name", "key", "state", "firing", "time"),
    [
        ("alertmanager/real-0.25-1-firing-two", HOST_DOWN, "firing", [WEB_1, WEB_2], 1795998484939),
        ("alertmanager/real-0.25-2-one-of-two-resolved", HOST_DOWN, "firing", [WEB_2], 1795998517000),
        ("alertmanager/real-0.25-3-new-firing-in-the-same-group", HOST_DOWN, "firing", [WEB_2, WEB_3], 1795998528998),
        ("alertmanager/real-0.25-4-all-resolved", HOST_DOWN, "resolved", [], 1795998538000),
    ],
)
def test_recorded_body_belongs_to_its_story(name: str, key: str, state: str, firing: list[str], time: int) -> None:
    message = only(made(body(name), **HEADERS.get(name, {})))
    assert (message["key"], message["state"], message["firing"], message["time"]) == (key, state, firing, time)
    assert message["event"] == state


def test_each_alert_is_a_story_of_its_own_when_the_hook_wants_that() -> None:
    first = made(body("alertmanager/real-0.25-1-firing-two"), per="alerts")["messages"]
    last = made(body("alertmanager/real-0.25-4-all-resolved"), per="alerts")["messages"]
    assert [each["key"] for each in first] == [WEB_1, WEB_2]
    assert [each["key"] for each in last] == [WEB_1, WEB_2, WEB_3]
    assert [each["firing"] for each in first] == [[WEB_1], [WEB_2]]
    assert {each["state"] for each in last} == {"resolved"}
    assert last[1]["body"].startswith("✅ HostDown: resolved\n\nweb-2 down\n")


def test_other_alertmanager_of_a_pair_says_nothing_new() -> None:
    first = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    second = {**first, "externalURL": "http://other:9093", "alerts": list(reversed(first["alerts"]))}
    second["alerts"][1] = {**second["alerts"][1], "generatorURL": "http://other:9090/graph"}
    one, two = only(made(json.dumps(first))), only(made(json.dumps(second)))
    assert one["body"] != two["body"]
    assert one["digest"] == two["digest"]


def test_changed_annotation_says_something_new() -> None:
    first = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    second = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    second["alerts"][0]["annotations"]["summary"] = "web-1 has been down for an hour"
    assert only(made(json.dumps(first)))["digest"] != only(made(json.dumps(second)))["digest"]


def test_alert_that_fires_again_is_another_one() -> None:
    """A receiver without send_resolved hears of the second time alone."""
    first = json.loads(body("alertmanager/firing-minimal"))
    second = json.loads(body("alertmanager/firing-minimal"))
    second["alerts"][0]["startsAt"] = "2025-07-17T09:00:00Z"
    one, two = only(made(json.dumps(first))), only(made(json.dumps(second)))
    assert one["key"] == two["key"]
    assert not set(one["firing"]) & set(two["firing"])


def test_end_of_an_alert_that_fires_is_no_time() -> None:
    """Old versions give the time at which it would end unless it is sent again."""
    payload = json.loads(body("alertmanager/firing-minimal"))
    payload["alerts"][0]["endsAt"] = "2025-07-17T08:00:00Z"
    assert only(made(json.dumps(payload)))["time"] == 1752735600000


def test_ten_alerts_are_one_message() -> None:
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    payload["alerts"] = [
        {
            **payload["alerts"][0],
            "status": "resolved" if number > 7 else "firing",
            "labels": {"alertname": "HostDown", "instance": f"web-{number}"},
            "annotations": {"summary": f"web-{number} is down"},
            "fingerprint": str(number),
        }
        for number in range(10)
    ]
    message = only(made(json.dumps(payload)))
    assert message["body"].startswith("🔥 HostDown: firing 8, resolved 2\n")
    assert message["body"].count("\n- 🔥 web-") == 8
    assert message["body"].count("\n- ✅ web-") == 2


def test_many_alerts_are_cut_from_the_end_and_counted() -> None:
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    payload["alerts"] = [
        {**payload["alerts"][0], "labels": {"instance": f"web-{number}"}, "fingerprint": str(number)}
        for number in range(2_000)
    ]
    found = made(json.dumps(payload))
    message = only(found)
    assert found["warnings"] == []
    assert "firing 2000" in message["body"]
    assert "\n… and 1700 more\n" in message["body"]
    assert len(message["firing"]) == 2_000


def test_left_out_alerts_are_told() -> None:
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    payload["truncatedAlerts"] = 8
    assert "… and 8 more, which were left out by the sender" in only(made(json.dumps(payload)))["body"]


def test_notification_without_alerts_shows_nothing() -> None:
    found = made('{"status": "firing", "alerts": [], "groupLabels": {}, "groupKey": "{}"}')
    assert found["messages"] == []
    assert found["nothing"] == "a notification without alerts"


def test_group_key_of_any_length_is_a_key() -> None:
    payload = json.loads(body("alertmanager/firing-minimal"))
    payload["groupKey"] = "{}:{alertname=" + "x" * 400 + "}"
    found = only(made(json.dumps(payload)))["key"]
    assert len(found) == 64
    assert found == only(made(json.dumps(payload)))["key"]


@pytest.mark.parametrize("alerts", [None, {}, "x", [None], [1]])
def test_body_without_alerts_becomes_a_summary(alerts: Any) -> None:
    found = made(json.dumps({"alerts": alerts, "receiver": "all"}), source="alertmanager")
    assert len(found["messages"]) == 1
    assert found["warnings"][0].startswith("Alertmanager: it")


@pytest.mark.parametrize("name", ["alertmanager"])
def test_sample_is_recognised_and_shown(name: str) -> None:
    source = BY_NAME[name]
    headers = {key.lower().replace("-", "_"): value for key, value in source.sample_headers.items()}
    found = made(json.dumps(source.sample), **headers)
    assert (found["source"], found["warnings"]) == (name, [])
    golden(GOLDEN / name / "sample.html", found["messages"][0]["html"])
    golden(GOLDEN / name / "sample.txt", found["messages"][0]["body"])
