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
NAMES = ("alertmanager", "cloudevents", "grafana", "pagerduty", "sentry", "sns", "uptime-kuma")
HEADERS = {  # where the body alone does not tell what it is
    "sentry/issue-created": {"sentry_hook_resource": "issue", "sentry_hook_timestamp": "1588082166"},
}
RECORDED = [
    str(file.relative_to(PAYLOADS).with_suffix(""))
    for folder in NAMES
    for file in sorted((PAYLOADS / folder).glob("*.json"))
]


def body(name: str) -> str:
    return (PAYLOADS / f"{name}.json").read_text()


def made(body: str, *, source: str = "auto", per: str = "notification", **headers: str) -> dict[str, Any]:
    return _made(
        body,
        source=source,
        per=per,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def _made(body: str, **given: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "source": "auto",
        "per": "notification",
        "headers": {},
        "template": None,
        "is_text": False,
        "plain": False,
    }
    found: dict[str, Any] = json.loads(webhook(body, {**usual, **given})[0])
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
    assert "\n… and 1850 more\n" in message["body"]
    assert len(message["firing"]) == 2_000


def test_left_out_alerts_are_told() -> None:
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    payload["truncatedAlerts"] = 8
    assert "… and 8 more, which were left out by the sender" in only(made(json.dumps(payload)))["body"]


def test_notification_without_alerts_shows_nothing() -> None:
    found = made('{"status": "firing", "alerts": [], "groupLabels": {}, "groupKey": "{}"}')
    assert found["messages"] == []
    assert found["nothing"] == "a notification without alerts"


def test_fingerprint_of_any_length_is_an_id() -> None:
    long, other = (
        only(made(altered("alertmanager/firing-two", ("alerts.0.fingerprint", "x" * 5_000 + end)))) for end in "ab"
    )
    assert [len(each) for each in long["firing"]] == [30, 30]
    assert long["firing"][0] != other["firing"][0]


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


@pytest.mark.parametrize("name", NAMES)
def test_sample_is_recognised_and_shown(name: str) -> None:
    source = BY_NAME[name]
    headers = {key.lower().replace("-", "_"): value for key, value in source.sample_headers.items()}
    found = made(json.dumps(source.sample), **headers)
    assert (found["source"], found["warnings"]) == (name, [])
    golden(GOLDEN / name / "sample.html", found["messages"][0]["html"])
    golden(GOLDEN / name / "sample.txt", found["messages"][0]["body"])


def altered(name: str, *changes: tuple[str, Any]) -> str:
    """A recorded body with other values at these paths (keys joined by dots)."""
    payload = json.loads(body(name))
    for path, value in changes:
        *above, last = path.split(".")
        at = payload
        for key in above:
            at = at[int(key)] if isinstance(at, list) else at[key]
        at[last] = value
    return json.dumps(payload)


MIXED, LOAD = "grafana/mixed-firing-and-resolved", "grafana/resolved"
KUMA, PAGER = "uptime-kuma/down", "pagerduty/v3-incident-triggered"
ISSUE, ALARM = "sentry/issue-created", "sns/cloudwatch-alarm"
ALARM_OK = json.loads(body(ALARM))["Message"].replace('"ALARM"', '"OK"').replace("23:53:45", "23:59:45")
NO_DATA = ALARM_OK.replace('"OK"', '"INSUFFICIENT_DATA"')

STORIES: dict[str, list[tuple[str, str, list[str], int | None]]] = {
    # of bodies: the first line of each message, its state, what fires, and when
    "grafana": [
        (
            altered(LOAD, ("alerts.0.status", "firing"), ("alerts.0.endsAt", "0001-01-01T00:00:00Z")),
            "🔥 Load avg 15m too high: firing",
            ["becbfb94bd81ef48-1710469680000"],
            1710469680000,
        ),
        (body(LOAD), "✅ Load avg 15m too high: resolved", [], 1710470520000),
    ],
    "grafana, several": [
        (
            altered(MIXED, ("alerts.0.status", "firing"), ("alerts.1.status", "firing")),
            "🔥 Test alert, Second webhook test: firing 3",
            [
                "aaafafe0953f0962-1655427840782",
                "fb31814ac93dbe7d-1655427840782",
                "6f9cd313db421ef1-1655427780782",
            ],
            1655427840782,
        ),
        (
            body(MIXED),
            "🔥 Second webhook test, Test alert: firing 1, resolved 2",
            ["6f9cd313db421ef1-1655427780782"],
            1655428108653,
        ),
        (
            altered(MIXED, ("alerts.2.status", "resolved"), ("alerts.2.endsAt", "2022-06-17T02:00:00Z")),
            "✅ Test alert, Second webhook test: resolved 3",
            [],
            1655431200000,
        ),
    ],
    "grafana before 9": [
        (body("grafana/legacy-8-alerting"), "🔥 Panel Title alert: alerting", [""], None),
        (altered("grafana/legacy-8-alerting", ("state", "no_data")), "🔥 Panel Title alert: no data", [""], None),
        (altered("grafana/legacy-8-alerting", ("state", "ok")), "✅ Panel Title alert: ok", [], None),
    ],
    "uptime-kuma": [
        (body(KUMA), "🔥 Testing: down", [""], 1642773998000),
        (
            altered(KUMA, ("heartbeat.status", 1), ("heartbeat.time", "2022-01-21 14:10:38.5")),
            "✅ Testing: up",
            [],
            1642774238500,
        ),
    ],
    "pagerduty": [
        (body(PAGER), "🔥 Test Incident 3: triggered", [""], 1622813729781),
        (
            altered(PAGER, ("event.event_type", "incident.acknowledged"), ("event.data.status", "acknowledged")),
            "👀 Test Incident 3: acknowledged by Person 1",
            [""],
            1622813729781,
        ),
        (
            altered(
                PAGER,
                ("event.event_type", "incident.resolved"),
                ("event.data.status", "resolved"),
                ("event.occurred_at", "2021-06-04T14:35:29Z"),
            ),
            "✅ Test Incident 3: resolved by Person 1",
            [],
            1622817329000,
        ),
    ],
    "sentry": [
        (body(ISSUE), "🔥 Exception: Custom exception!: new issue", [""], 1588082166000),
        (
            altered(ISSUE, ("action", "assigned"), ("actor.name", "Person 1")),
            "🔥 Exception: Custom exception!: assigned by Person 1",
            [""],
            1588082166000,
        ),
        (
            altered(ISSUE, ("action", "resolved"), ("data.issue.status", "resolved")),
            "✅ Exception: Custom exception!: resolved",
            [],
            1588082166000,
        ),
        (
            altered(ISSUE, ("action", "archived"), ("data.issue.status", "ignored")),
            "✅ Exception: Custom exception!: archived",
            [],
            1588082166000,
        ),
    ],
    "sns": [
        (body(ALARM), "🔥 bucketbytesAlarm: alarm", [""], 1550274825093),
        (altered(ALARM, ("Message", ALARM_OK)), "✅ bucketbytesAlarm: ok", [], 1550275185093),
        (altered(ALARM, ("Message", NO_DATA)), "bucketbytesAlarm: insufficient data", [], 1550275185093),
    ],
}
SENTRY = HEADERS[ISSUE]


@pytest.mark.parametrize("tool", STORIES)
def test_bodies_of_one_thing_are_one_story(tool: str) -> None:
    keys = set()
    for text, title, firing, time in STORIES[tool]:
        message = only(made(text, **(SENTRY if tool == "sentry" else {})))
        assert message["body"].partition("\n")[0] == title
        assert (message["firing"], message["time"]) == (firing, time)
        assert message["state"] == {"🔥": "firing", "👀": "firing", "✅": "resolved"}.get(title[0], "")
        keys.add(message["key"])
    assert len(keys) == 1
    assert "" not in keys


def test_group_too_large_for_messages_of_their_own_is_one() -> None:
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    payload["alerts"] = [{**payload["alerts"][0], "fingerprint": str(number)} for number in range(51)]
    message = only(made(json.dumps(payload), per="alerts"))
    assert (message["key"], len(message["firing"])) == (HOST_DOWN, 51)


def test_group_without_a_key_is_known_by_its_labels() -> None:
    payload = json.loads(body("alertmanager/real-0.25-1-firing-two"))
    del payload["groupKey"]
    assert only(made(json.dumps(payload)))["key"] == "all:[('alertname', 'HostDown')]"


def test_what_grafanas_owner_has_worded_is_shown() -> None:
    text = only(made(altered(MIXED, ("title", "Look at this"), ("message", "Call *Anna*\nor Bob"))))["body"]
    assert text.startswith("🔥 Look at this: firing 1, resolved 2\n\nCall *Anna*\nor Bob\n")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://grafana.example.org/alerting/1/view", "https://grafana.example.org/alerting/1/view"),
        ("/alerting/1/view", "https://grafana.example.org/g/alerting/1/view"),
        ("localhost:3000/alerting/1/view", "http://localhost:3000/alerting/1/view"),
        ("?orgId=1", ""),
        ("//evil.example/", ""),
        ("javascript:alert(1)", ""),
        ("https://x.example/\"onclick='x'", ""),
    ],
)
def test_links_are_completed_or_left_out(given: str, shown: str) -> None:
    changes = ("externalURL", "https://grafana.example.org/g/"), ("alerts.0.generatorURL", given)
    text = only(made(altered(LOAD, *changes)))["body"]
    assert (f"Source ({shown})" in text) if shown else "Source" not in text


def test_uptime_kuma_shows_no_secret_of_the_monitor() -> None:
    text = altered(
        KUMA,
        ("monitor.url", "https://admin:canary-1@shop.example.org:8443/health?token=canary-2#canary-3"),
        ("monitor.basic_auth_pass", "canary-4"),
        ("monitor.headers", '{"Authorization": "canary-5"}'),
        ("monitor.body", "canary-6"),
        ("monitor.databaseConnectionString", "postgres://canary-7"),
        ("monitor.pushToken", "canary-8"),
    )
    message = only(made(text))
    assert "where: https://shop.example.org:8443/health\n" in message["body"]
    assert "canary" not in json.dumps(message)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (
            {
                "event_type": "incident.annotated",
                "occurred_at": "2026-11-30T13:35:29Z",
                "agent": {"summary": "Person 1"},
                "data": {"type": "incident_note", "content": "Rebooted it", "incident": {"summary": "Shop is down"}},
            },
            "Shop is down: note by Person 1\n\nRebooted it\n\nat 2026-11-30 13:35 UTC",
        ),
        (
            {
                "event_type": "incident.responder.replied",
                "data": {"incident": {"summary": "Shop is down"}, "user": {"summary": "Person 2"}, "state": "accepted"},
            },
            "Shop is down: responder replied\n\nresponder: Person 2 · state: accepted",
        ),
        (
            {"event_type": "service.updated", "agent": {"summary": "Person 1"}, "data": {"summary": "Shop"}},
            "Shop: service updated by Person 1",
        ),
        (
            {"event_type": "pagey.ping", "data": {"message": "Hello from your friend Pagey!", "type": "ping"}},
            "PagerDuty\n\nHello from your friend Pagey!",
        ),
    ],
)
def test_pagerdutys_other_events_are_messages_of_their_own(payload: dict[str, Any], expected: str) -> None:
    message = only(made(json.dumps({"event": payload})))
    assert message["body"] == expected
    assert (message["key"], message["state"], message["event"]) == ("", "", payload["event_type"])


EVENT = {
    "event_id": "e1",
    "issue_id": "1170820242",
    "title": "ReferenceError: blooopy is not defined",
    "culprit": "?(<anonymous>)",
    "level": "error",
    "datetime": "2019-08-19T21:06:51.000Z",
    "web_url": "https://acme.sentry.io/issues/1170820242/events/e1/",
    "request": {"headers": [["Cookie", "canary"]], "cookies": "canary"},
    "user": {"email": "canary@example.org"},
}
METRIC = {
    "id": "4",
    "title": "Too many errors",
    "alert_rule": {"name": "Errors"},
    "date_started": "2026-11-30T10:00:00Z",
}


@pytest.mark.parametrize(
    ("resource", "action", "data", "expected", "key", "state"),
    [
        (
            "event_alert",
            "triggered",
            {"event": EVENT, "triggered_rule": "New errors"},
            (
                "🔥 ReferenceError: blooopy is not defined: alert\n\n"
                "rule: New errors · in: ?(<anonymous>) · level: error\nat 2019-08-19 21:06 UTC\n\n"
                "Sentry (https://acme.sentry.io/issues/1170820242/events/e1/)"
            ),
            "issue:1170820242",
            "firing",
        ),
        (
            "error",
            "created",
            {"error": EVENT},
            (
                "ReferenceError: blooopy is not defined: error\n\n"
                "in: ?(<anonymous>) · level: error\nat 2019-08-19 21:06 UTC\n\n"
                "Sentry (https://acme.sentry.io/issues/1170820242/events/e1/)"
            ),
            "",
            "",
        ),
        (
            "metric_alert",
            "critical",
            {
                "metric_alert": METRIC,
                "description_text": "1000 events in 10 minutes",
                "web_url": "https://x.sentry.io/4",
            },
            "🔥 Errors: critical\n\n1000 events in 10 minutes\n\nsince 2026-11-30 10:00 UTC\n\nSentry (https://x.sentry.io/4)",
            "metric:4",
            "firing",
        ),
        (
            "metric_alert",
            "resolved",
            {"metric_alert": {**METRIC, "date_closed": "2026-11-30T11:00:00Z"}},
            "✅ Errors: resolved\n\nresolved 2026-11-30 11:00 UTC after 1 h",
            "metric:4",
            "resolved",
        ),
        (
            "comment",
            "created",
            {"comment": "Mine", "issue_id": 7, "project_slug": "shop", "timestamp": "2026-11-30T11:00:00Z"},
            "Issue 7: comment created by Person 1\n\nMine\n\nproject: shop\nat 2026-11-30 11:00 UTC",
            "",
            "",
        ),
    ],
)
def test_sentrys_other_resources(
    resource: str, action: str, data: dict[str, Any], expected: str, key: str, state: str
) -> None:
    text = json.dumps({"action": action, "data": data, "actor": {"name": "Person 1"}, "installation": {"uuid": "x"}})
    message = only(made(text, sentry_hook_resource=resource))
    assert message["body"] == expected
    assert (message["key"], message["state"], message["event"]) == (key, state, f"{resource}.{action}")


def test_alert_of_sentry_for_a_known_issue_fires_anew() -> None:
    """A rule that alerts of an issue once more was told to, and how often it may."""
    first, second = (
        only(made(json.dumps({"action": "triggered", "data": {"event": {**EVENT, "event_id": name}}}), source="sentry"))
        for name in ("e1", "e2")
    )
    assert first["key"] == second["key"]
    assert (first["firing"], second["firing"]) == (["e1"], ["e2"])


def test_sentrys_news_of_the_integration_show_nothing() -> None:
    found = made('{"action": "created", "data": {"installation": {}}}', sentry_hook_resource="installation")
    assert (found["messages"], found["nothing"]) == ([], "news of the integration itself")


def sns(message: str, **more: str) -> str:
    topic = "arn:aws:sns:eu-west-1:1:backups"
    return json.dumps({"Type": "Notification", "MessageId": "m1", "TopicArn": topic, "Message": message, **more})


@pytest.mark.parametrize(
    ("text", "headers", "expected"),
    [
        (sns("All <done>\nin time"), {}, "backups\n\nAll <done>\nin time"),
        (
            sns("done", Subject="Nightly", Timestamp="2026-11-30T10:00:00.1Z"),
            {},
            "Nightly\n\ndone\n\ntopic: backups\nat 2026-11-30 10:00 UTC",
        ),
        (sns('{"state": "ok", "files": 3}'), {}, "backups\n\n- state: ok\n- files: 3"),
        (sns("{not json"), {}, "backups\n\n{not json"),
        (
            '{"state": "ok"}',
            {
                "x_amz_sns_message_type": "Notification",
                "x_amz_sns_rawdelivery": "true",
                "x_amz_sns_topic_arn": "arn:aws:sns:eu-west-1:1:backups",
            },
            "backups\n\n- state: ok",
        ),
    ],
)
def test_other_messages_of_sns_are_shown(text: str, headers: dict[str, str], expected: str) -> None:
    found = made(text, **headers)
    assert (found["source"], only(found)["body"], only(found)["key"]) == ("sns", expected, "")


def test_confirmation_of_an_end_offers_to_subscribe_again() -> None:
    text = altered("sns/subscription-confirmation", ("Type", "UnsubscribeConfirmation"))
    message = only(made(text))
    assert message["body"].startswith("AWS SNS: the subscription has ended\n")
    assert ">Subscribe again</a>" in message["html"]


BINARY = {
    "ce_specversion": "1.0",
    "ce_type": "org.example.paid",
    "ce_source": "/shop",
    "ce_id": "7",
    "ce_subject": "order%20%E2%82%AC",
    "ce_time": "2026-11-30T10:00:00Z",
}


def test_binary_cloudevent_is_in_its_headers() -> None:
    found = made('{"total": 42}', **BINARY)
    assert found["delivery_id"] == "/shop 7"
    assert only(found)["body"] == "org.example.paid: order €\n\nsource: /shop\nat 2026-11-30 10:00 UTC\n\n- total: 42"


def test_batch_of_cloudevents_is_several_messages() -> None:
    event = json.loads(body("cloudevents/structured"))
    kind = "application/cloudevents-batch+json; charset=utf-8"
    found = made(json.dumps([event, {**event, "id": "2", "type": "org.example.other"}]), content_type=kind)
    assert [each["event"] for each in found["messages"]] == ["com.example.someevent", "org.example.other"]
    assert found["delivery_id"] == ""
    assert made("[]", content_type=kind)["nothing"] == "a batch without events"


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        (body(PAGER), "pagerduty", "01BZYIL05THJDFF2Y08X9SVMTU"),
        (body(ALARM), "sns", "e288882d-4281-5be4-8fde-dccc11c8cb01"),
        (body("cloudevents/structured"), "cloudevents", "/mycontext C234-1234-1234"),
        (body("alertmanager/firing-two"), "alertmanager", ""),
        (body(MIXED), "grafana", ""),
        (body(KUMA), "uptime-kuma", ""),
        (body("stripe/invoice-payment-failed"), "generic", "evt_00000000000000"),
        ('{"id": "evt_1"}', "generic", ""),
    ],
)
def test_senders_own_id_of_a_delivery(text: str, source: str, expected: str) -> None:
    found = made(text)
    assert (found["source"], found["delivery_id"]) == (source, expected)


def test_standard_webhooks_have_an_id_of_a_delivery() -> None:
    assert made('{"type": "user.created"}', webhook_id="msg_1")["delivery_id"] == "msg_1"


def test_what_has_ended_is_listed_too() -> None:
    message = only(made(body("alertmanager/real-0.25-3-new-firing-in-the-same-group")))
    assert (message["firing"], message["ended"]) == ([WEB_2, WEB_3], [WEB_1])
    assert only(made(body(KUMA)))["ended"] is None


def test_template_of_the_page_words_alerts() -> None:
    page = (Path(__file__).parents[3] / "docs" / "hooks.md").read_text()
    section = page.partition("### Alertmanager\n")[2].partition("\n### ")[0]
    template = section.partition("```jinja\n")[2].partition("```")[0]
    found = _made(body("alertmanager/real-0.25-1-firing-two"), template={"markdown": template})
    assert found["warnings"] == []
    assert only(found)["html"].startswith(
        "<p>🔥 <strong>HostDown</strong>: firing 2</p>\n<ul>\n<li>web-1:9100: web-1 &lt;b"
    )
    assert "<li>web-2:9100: web-2 down, since 2026-11-30 00:28 UTC</li>" in only(found)["html"]
