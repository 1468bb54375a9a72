"""Sentry: webhooks of an internal or public integration (`Sentry-Hook-Resource`), and the legacy plugin "WebHooks".

The events have the visitor's request, headers, cookies and data in them: only what is named here is shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flowbridge.sources.reading import at, mapping, moment, text
from flowbridge.sources.report import FIRING, RESOLVED, report, words
from flowbridge.sources.source import Headers, Incoming, Nothing, Notice, Source, State, UnrecognisedError

_RESOURCE = "sentry-hook-resource"
_ENDED = frozenset(["resolved", "archived", "ignored"])  # "archived" was "ignored" once


def recognises(headers: Headers, payload: Any) -> bool:
    if _RESOURCE in headers:
        return True
    is_plugin = isinstance(at(payload, "event"), dict) and bool(text(payload, "project_slug"))
    return is_plugin or "uuid" in mapping(payload, "installation")


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    action, data = text(payload, "action"), mapping(payload, "data")
    resource = incoming.headers.get(_RESOURCE) or _resource(payload)
    event = ".".join(filter(None, (resource, action)))
    time = _time(incoming.headers)
    if resource == "installation":
        return Nothing("news of the integration itself", event)
    if metric := mapping(data, "metric_alert"):
        return [_metric(data, metric, action, event, time)]
    if issue := mapping(data, "issue"):
        return [_issue(payload, issue, action, event, time)]
    if found := mapping(data, "event") or mapping(data, "error"):
        return [_event(found, event, text(data, "triggered_rule"), time, is_alert="event" in data)]
    if "comment" in data:
        return [_comment(payload, data, event)]
    if found := mapping(payload, "event"):
        return [_plugin(payload, found)]
    raise UnrecognisedError("it has no issue, event, alert or comment")


def _resource(payload: Any) -> str:
    """Where the header is missing, as in a preview."""
    data = mapping(payload, "data")
    return next(
        (name for name in ("installation", "metric_alert", "issue", "error", "comment") if name in data), "event"
    )


def _time(headers: Headers) -> int | None:
    """When it was sent, by Sentry's clock: issues have no time of their changes."""
    found = headers.get("sentry-hook-timestamp", "")
    return moment(int(found)) if len(found) <= 13 and found.isascii() and found.isdigit() else None


def _issue(payload: Any, issue: Mapping[str, Any], action: str, event: str, time: int | None) -> Notice:
    state: State = "resolved" if action in _ENDED or text(issue, "status") in _ENDED else "firing"
    who = text(payload, "actor", "name")
    times = text(issue, "count")
    return Notice(
        event,
        {
            "report": report(
                text(issue, "title") or text(issue, "shortId"),
                mark=FIRING if state == "firing" else RESOLVED,
                outcome=("new issue" if action == "created" else action)
                + (f" by {who}" if who not in ("", "Sentry") else ""),
                facts=[
                    ("project", text(issue, "project", "name") or text(issue, "project", "slug")),
                    ("in", text(issue, "culprit")),
                    ("level", text(issue, "level")),
                    ("issue", text(issue, "shortId")),
                    ("seen", f"{times} times" if times not in ("", "0", "1") else ""),
                    ("assigned to", text(issue, "assignedTo", "name") or text(issue, "assignedTo", "email")),
                ],
                since=at(issue, "firstSeen"),
                began="first seen",
                links=[("Sentry", text(issue, "web_url") or text(issue, "permalink"))],
            )
        },
        key=_key(text(issue, "id")),
        state=state,
        firing=("",) if state == "firing" else (),
        time=time,
    )


def _event(found: Mapping[str, Any], event: str, rule: str, time: int | None, *, is_alert: bool) -> Notice:
    """An error; `is_alert`: a rule says so, which also sees to it that it does not do so too often."""
    name = text(found, "event_id") or text(found, "id")
    return Notice(
        event,
        {
            "report": report(
                text(found, "title") or text(found, "message"),
                mark=FIRING if is_alert else "",
                outcome="alert" if is_alert else "error",
                text=_other(text(found, "message"), text(found, "title")),
                facts=[
                    ("rule", rule),
                    ("in", text(found, "culprit")),
                    ("level", text(found, "level")),
                    ("environment", text(found, "environment")),
                    ("release", text(found, "release")),
                ],
                since=at(found, "datetime") or at(found, "timestamp"),
                began="at",
                links=[("Sentry", text(found, "web_url"))],
            )
        },
        key=_key(text(found, "issue_id")) if is_alert else "",
        state="firing" if is_alert else "",
        firing=(name,) if is_alert else (),
        time=time or moment(at(found, "datetime")),
    )


def _metric(data: Mapping[str, Any], alert: Mapping[str, Any], action: str, event: str, time: int | None) -> Notice:
    is_resolved = action == "resolved"
    rule = text(alert, "alert_rule", "name")
    projects = alert.get("projects")
    return Notice(
        event,
        {
            "report": report(
                rule or text(alert, "title") or text(data, "description_title"),
                mark=RESOLVED if is_resolved else FIRING,
                outcome=action,
                text=text(data, "description_text"),
                facts=[
                    ("project", ", ".join(map(str, projects[:5])) if isinstance(projects, list) else ""),
                    ("environment", text(alert, "alert_rule", "environment")),
                ],
                since=at(alert, "date_started"),
                until=at(alert, "date_closed") if is_resolved else None,
                links=[("Sentry", text(data, "web_url"))],
            )
        },
        key=f"metric:{text(alert, 'id')}" if text(alert, "id") else "",
        state="resolved" if is_resolved else "firing",
        firing=() if is_resolved else ("",),
        time=time,
    )


def _comment(payload: Any, data: Mapping[str, Any], event: str) -> Notice:
    return Notice(
        event,
        {
            "report": report(
                f"Issue {text(data, 'issue_id')}",
                outcome=f"comment {text(payload, 'action')} by {text(payload, 'actor', 'name') or 'somebody'}",
                text=text(data, "comment"),
                facts=[("project", text(data, "project_slug"))],
                since=at(data, "timestamp"),
                began="at",
            )
        },
    )


def _plugin(payload: Any, found: Mapping[str, Any]) -> Notice:
    title = text(found, "title") or text(payload, "message")
    return Notice(
        "event_alert",
        {
            "report": report(
                title,
                mark=FIRING,
                outcome="alert",
                text=_other(text(payload, "message"), title),
                facts=[
                    ("project", text(payload, "project_name") or text(payload, "project_slug")),
                    ("in", text(payload, "culprit")),
                    ("level", text(payload, "level")),
                    ("environment", text(found, "environment")),
                    ("release", text(found, "release")),
                ],
                since=at(found, "timestamp") or at(found, "datetime"),
                began="at",
                links=[("Sentry", text(payload, "url"))],
            )
        },
        key=_key(text(payload, "id")),
        state="firing",
        firing=(text(found, "event_id"),),
        time=moment(at(found, "timestamp")) or moment(at(found, "datetime")),
    )


def _key(issue: str) -> str:
    return f"issue:{issue}" if issue else ""


def _other(text: str, title: str) -> str:
    return "" if text == title else text


SOURCE = Source(
    "sentry",
    "Sentry",
    recognises,
    read,
    words,
    scheme="sentry",
    sample={
        "action": "created",
        "data": {
            "issue": {
                "id": "1635244907",
                "shortId": "SHOP-2",
                "title": "ValueError: the basket is empty",
                "culprit": "shop.checkout in pay",
                "level": "error",
                "status": "unresolved",
                "count": "1",
                "firstSeen": "2026-11-30T13:56:05.903736Z",
                "lastSeen": "2026-11-30T13:56:05.903736Z",
                "web_url": "https://acme.sentry.io/issues/1635244907/",
                "project": {"id": "5216640", "name": "Shop", "slug": "shop", "platform": "python"},
            }
        },
        "installation": {"uuid": "65027794-169a-4042-80d0-808ece377141"},
        "actor": {"type": "application", "id": "sentry", "name": "Sentry"},
    },
    sample_headers={
        "Content-Type": "application/json",
        "Request-ID": "4f3ab1e0-0000-4000-8000-000000000001",
        "Sentry-Hook-Resource": "issue",
        "Sentry-Hook-Timestamp": "1796046966",
    },
)
