"""Grafana's alerting: the webhook of contact points (unified alerting, 9 and later), and of the legacy alerts before.

Its groups are Alertmanager's with a few more keys. Labels and annotations are plain text in them; so are `title` and
`message` where somebody has worded them, while the default ones say less than the alerts do.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowbridge.models.hooks import Per
from flowbridge.sources.alerts import Alert, notices
from flowbridge.sources.reading import at, mapping, objects, text
from flowbridge.sources.report import FIRING, PAUSED, RESOLVED, report, web, words
from flowbridge.sources.source import Headers, Incoming, Nothing, Notice, Source, State, UnrecognisedError

_DEFAULT_TITLE = re.compile(r"\[(FIRING|RESOLVED)\b")
_DEFAULT_MESSAGE = re.compile(r"\*\*(Firing|Resolved)\*\*|(firing|resolved|alerting|ok)$", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?/")
_VALUE = re.compile(r"(?:var|metric)='([^']{0,100})'[^\]]{0,1000}? value=([^\s\]]{1,50})")
_MAX_VALUES = 10
_LINKS = {"panelURL": "Panel", "dashboardURL": "Dashboard", "generatorURL": "Source", "imageURL": "Picture"}
_STATES: dict[str, tuple[str, str, State]] = {
    "alerting": (FIRING, "alerting", "firing"),
    "no_data": (FIRING, "no data", "firing"),
    "ok": (RESOLVED, "ok", "resolved"),
    "paused": (PAUSED, "paused", ""),
}


def recognises(headers: Headers, payload: Any) -> bool:
    if isinstance(at(payload, "alerts"), list):
        return at(payload, "orgId") is not None or headers.get("user-agent", "").startswith("Grafana")
    return "ruleName" in mapping(payload) and "evalMatches" in mapping(payload)


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if isinstance(at(payload, "alerts"), list):
        return _unified(payload, incoming.per)
    if isinstance(at(payload, "ruleName"), str):
        return [_legacy(payload)]
    raise UnrecognisedError("it has no list of alerts, and no rule's name")


def _unified(payload: Mapping[str, Any], per: Per) -> Sequence[Notice] | Nothing:
    status, base = text(payload, "status"), text(payload, "externalURL")
    alerts = [
        Alert.read(alert, status, _links(alert, base, is_firing=text(alert, "status") != "resolved"), _values(alert))
        for alert in objects(payload, "alerts")
    ]
    title, message = text(payload, "title").strip(), text(payload, "message").strip()
    return notices(
        payload,
        alerts,
        per,
        title="" if _DEFAULT_TITLE.match(title) else title,
        message="" if _DEFAULT_MESSAGE.match(message) else message,
    )


def _links(alert: Mapping[str, Any], base: str, *, is_firing: bool) -> list[tuple[str, str]]:
    names = {**_LINKS, "silenceURL": "Silence"} if is_firing else _LINKS
    return [(name, url) for key, name in names.items() if (url := _complete(text(alert, key), base))]


def _complete(url: str, base: str) -> str:
    """Grafana says what its root_url says: that may lack the scheme, or be nothing but a path."""
    if url.startswith("/") and not url.startswith("//"):
        url = base.rstrip("/") + url
    return web(url) or (web(f"http://{url}") if _HOST.match(url) else "")


def _values(alert: Mapping[str, Any]) -> str:
    found = [(name, value) for name, value in mapping(alert, "values").items() if isinstance(value, int | float)]
    pairs = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in found]
    return ", ".join(
        f"{name}={value}" for name, value in (pairs or _VALUE.findall(text(alert, "valueString")[:4_000]))[:_MAX_VALUES]
    )


def _legacy(payload: Mapping[str, Any]) -> Notice:
    name = text(payload, "state")
    mark, outcome, state = _STATES.get(name, ("", name.replace("_", " "), ""))
    matches = [(text(match, "metric"), text(match, "value")) for match in objects(payload, "evalMatches")]
    rule = text(payload, "ruleId")
    return Notice(
        event=name,
        view={
            "report": report(
                text(payload, "ruleName") or text(payload, "title"),
                mark=mark,
                outcome=outcome,
                text=text(payload, "message"),
                facts=[*((tag, text(payload, "tags", tag)) for tag in mapping(payload, "tags")), *matches],
                links=[("Rule", text(payload, "ruleUrl")), ("Picture", text(payload, "imageUrl"))],
            )
        },
        key=f"rule:{rule}" if rule else "",
        state=state,
        firing=("",) if state == "firing" else (),
    )


SAMPLE = {
    "receiver": "flowbridge",
    "status": "firing",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "High load", "grafana_folder": "Nodes", "instance": "web-1:9100"},
            "annotations": {
                "summary": "The load of web-1 is above 10",
                "runbook_url": "https://runbooks.example.org/high-load",
            },
            "startsAt": "2026-11-30T00:28:04.938Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "https://grafana.example.org/alerting/grafana/NW9oDw-4z/view?orgId=1",
            "fingerprint": "becbfb94bd81ef48",
            "silenceURL": "https://grafana.example.org/alerting/silence/new?alertmanager=grafana&orgId=1",
            "dashboardURL": "https://grafana.example.org/d/nodes?orgId=1",
            "panelURL": "https://grafana.example.org/d/nodes?orgId=1&viewPanel=1",
            "values": {"B": 18.98211314475876},
            "valueString": "[ var='B' labels={instance=web-1:9100} value=18.98211314475876 ]",
            "orgId": 1,
        }
    ],
    "groupLabels": {"alertname": "High load", "grafana_folder": "Nodes"},
    "commonLabels": {"alertname": "High load", "grafana_folder": "Nodes", "instance": "web-1:9100"},
    "commonAnnotations": {"summary": "The load of web-1 is above 10"},
    "externalURL": "https://grafana.example.org/",
    "version": "1",
    "groupKey": '{}/{}:{alertname="High load", grafana_folder="Nodes"}',
    "truncatedAlerts": 0,
    "orgId": 1,
    "title": "[FIRING:1] High load Nodes (web-1:9100)",
    "state": "alerting",
    "message": "**Firing**\n\nValue: B=18.98211314475876\nLabels:\n - alertname = High load\n",
}
SOURCE = Source(
    "grafana",
    "Grafana",
    recognises,
    read,
    words,
    sample=SAMPLE,
    sample_headers={"User-Agent": "Grafana", "Content-Type": "application/json"},
)
