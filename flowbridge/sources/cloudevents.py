"""CloudEvents 1.0 over HTTP: structured (one JSON object), batched (a list of them) and binary (`ce-` headers)."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from flowbridge.sources.reading import at, mapping, objects, parsed, text
from flowbridge.sources.report import report, words
from flowbridge.sources.source import Headers, Incoming, Nothing, Notice, Source, UnrecognisedError
from flowbridge.sources.summary import summary

_REQUIRED = frozenset(["specversion", "type", "source", "id"])
_STRUCTURED = "application/cloudevents+json"
_BATCH = "application/cloudevents-batch+json"


def recognises(headers: Headers, payload: Any) -> bool:
    kind = headers.get("content-type", "")
    return "ce-specversion" in headers or kind.startswith((_STRUCTURED, _BATCH)) or mapping(payload).keys() >= _REQUIRED


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload, headers = incoming.payload, incoming.headers
    if "ce-specversion" in headers:
        return [_notice(_from_headers(headers), payload)]
    if isinstance(payload, list):
        found = [_structured(event) for event in objects({"events": payload}, "events") if text(event, "type")]
        return found or Nothing("a batch without events")
    if not text(payload, "type"):
        raise UnrecognisedError("it has no type, as every CloudEvent does")
    return [_structured(payload)]


def _structured(event: Mapping[str, Any]) -> Notice:
    data = "Binary data, which is not shown." if text(event, "data_base64") else event.get("data")
    return _notice(event, data)


def _notice(event: Mapping[str, Any], data: Any) -> Notice:
    found = parsed(data)
    kind = text(event, "type")
    is_text = not isinstance(found, dict | list)
    return Notice(
        event=kind,
        view={
            "report": report(
                kind or "CloudEvent",
                outcome=text(event, "subject"),
                text=text(found) if is_text else "",
                facts=[("source", text(event, "source"))],
                since=at(event, "time"),
                began="at",
            ),
            "details": "" if is_text or not found else summary(found),
        },
    )


def _from_headers(headers: Headers) -> dict[str, str]:
    return {name[3:]: unquote(value, errors="replace") for name, value in headers.items() if name.startswith("ce-")}


def delivery_id(headers: Headers, payload: Any) -> str:
    """A batch has none of its own."""
    event = _from_headers(headers) if "ce-specversion" in headers else mapping(payload)
    source, name = text(event, "source"), text(event, "id")
    if not name:
        return ""
    found = f"{source} {name}"
    return found if len(found) <= 200 else hashlib.sha256(found.encode("utf-8", "replace")).hexdigest()


SOURCE = Source(
    "cloudevents",
    "CloudEvents",
    recognises,
    read,
    words,
    delivery_id=delivery_id,
    sample={
        "specversion": "1.0",
        "type": "org.example.order.paid",
        "source": "https://shop.example.org/orders",
        "subject": "order 4711",
        "id": "A234-1234-1234",
        "time": "2026-11-30T17:31:00Z",
        "datacontenttype": "application/json",
        "data": {"order": 4711, "total": "42.00 EUR", "paid": True},
    },
    sample_headers={"Content-Type": "application/cloudevents+json; charset=utf-8"},
)
