"""PagerDuty's webhook subscriptions (V3): what happens to incidents, and to services."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowbridge.sources.reading import at, mapping, moment, objects, text
from flowbridge.sources.report import FIRING, NOTED, RESOLVED, report, words
from flowbridge.sources.source import Headers, Incoming, Notice, Source, State, UnrecognisedError

_STATES: dict[str, tuple[str, State]] = {
    "triggered": (FIRING, "firing"),
    "acknowledged": (NOTED, "firing"),
    "resolved": (RESOLVED, "resolved"),
}
_OUTCOMES = {  # where an event's name would not do
    "annotated": "note",
    "status_update_published": "status update",
    "responder.added": "responder asked",
    "responder.replied": "responder replied",
}


def recognises(headers: Headers, payload: Any) -> bool:
    return bool(text(payload, "event", "event_type")) and isinstance(at(payload, "event", "data"), dict)


def read(incoming: Incoming) -> Sequence[Notice]:
    event = mapping(incoming.payload, "event")
    name, data = text(event, "event_type"), mapping(event, "data")
    if not name or not data:
        raise UnrecognisedError("it has no event with data")
    if name == "pagey.ping":
        return [Notice(name, {"report": report("PagerDuty", text=text(data, "message") or "A test")})]
    action = name.partition(".")[2]
    outcome = _OUTCOMES.get(action, action.replace("_", " ").replace(".", " "))
    about = mapping(data, "incident")
    return [_beside(event, data, about, name, outcome) if about else _state(event, data, name, outcome)]


def _state(event: Mapping[str, Any], data: Mapping[str, Any], name: str, outcome: str) -> Notice:
    """What an incident, or a service, is like now."""
    mark, state = _STATES.get(text(data, "status"), ("", "")) if name.startswith("incident.") else ("", "")
    kind = "" if name.startswith("incident.") else f"{name.partition('.')[0]} "
    is_resolved = state == "resolved"
    number, time = text(data, "number"), at(event, "occurred_at")
    return Notice(
        name,
        {
            "report": report(
                text(data, "title") or text(data, "summary") or text(data, "id"),
                mark=mark,
                outcome=f"{kind}{outcome}{_by(event, outcome)}",
                text=text(data, "resolve_reason", "type") if is_resolved else "",
                facts=[
                    ("incident", f"#{number}" if number else ""),
                    ("service", text(data, "service", "summary")),
                    ("urgency", text(data, "urgency")),
                    ("priority", text(data, "priority", "summary")),
                    (
                        "assigned to",
                        ", ".join(filter(None, (text(one, "summary") for one in objects(data, "assignees")))),
                    ),
                ],
                since=at(data, "created_at") if is_resolved else time,
                until=time if is_resolved else None,
                began="at",
                links=[
                    ("PagerDuty", text(data, "html_url")),
                    ("Conference", text(data, "conference_bridge", "conference_url")),
                ],
            )
        },
        key=text(data, "id") if name.startswith("incident.") else "",
        state=state,
        firing=("",) if state == "firing" else (),
        time=moment(time),
    )


def _beside(
    event: Mapping[str, Any], data: Mapping[str, Any], about: Mapping[str, Any], name: str, outcome: str
) -> Notice:
    """What was said of an incident: a message of its own, since it is not what the incident is like."""
    who = text(data, "user", "summary") or text(data, "escalation_policy", "summary")
    return Notice(
        name,
        {
            "report": report(
                text(about, "summary") or text(about, "title") or text(about, "id"),
                outcome=f"{outcome}{_by(event, 'note')}",
                text=text(data, "content") or text(data, "message"),
                facts=[("responder", who), ("state", text(data, "state"))],
                since=at(event, "occurred_at"),
                began="at",
                links=[("PagerDuty", text(about, "html_url"))],
            )
        },
    )


def _by(event: Mapping[str, Any], outcome: str) -> str:
    who = text(event, "agent", "summary")
    return f" by {who}" if who and outcome != "triggered" else ""


def delivery_id(headers: Headers, payload: Any) -> str:
    return text(payload, "event", "id")


SOURCE = Source(
    "pagerduty",
    "PagerDuty",
    recognises,
    read,
    words,
    delivery_id=delivery_id,
    scheme="pagerduty",
    sample={
        "event": {
            "id": "01BZYIL05THJDFF2Y08X9SVMTU",
            "event_type": "incident.triggered",
            "resource_type": "incident",
            "occurred_at": "2026-11-30T13:35:29.781Z",
            "agent": {
                "html_url": "https://acme.pagerduty.com/services/PA2P440",
                "id": "PA2P440",
                "summary": "Shop",
                "type": "service_reference",
            },
            "client": None,
            "data": {
                "id": "PFQZPSY",
                "type": "incident",
                "self": "https://api.pagerduty.com/incidents/PFQZPSY",
                "html_url": "https://acme.pagerduty.com/incidents/PFQZPSY",
                "number": 9,
                "status": "triggered",
                "title": "The shop does not answer",
                "service": {"id": "PA2P440", "summary": "Shop", "type": "service_reference"},
                "assignees": [{"id": "PJ0LVEB", "summary": "Person 1", "type": "user_reference"}],
                "escalation_policy": {"id": "PY82TC6", "summary": "Default", "type": "escalation_policy_reference"},
                "teams": [],
                "priority": {"id": "PSO75BM", "summary": "P1", "type": "priority_reference"},
                "urgency": "high",
                "conference_bridge": None,
                "resolve_reason": None,
            },
        }
    },
    sample_headers={
        "User-Agent": "PagerDuty-Webhook/V3.0",
        "Content-Type": "application/json",
        "X-Webhook-Subscription": "PABC123",
    },
)
