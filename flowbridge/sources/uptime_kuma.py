"""Uptime Kuma's notification "Webhook", as JSON or as the part `data` of a form.

The body holds the whole monitor, with its password and headers: only what is named here is shown. A test, and a warning
that a certificate expires, come without heartbeat and monitor.
"""

import re
from collections.abc import Sequence
from typing import Any

from flowbridge.sources.reading import at, mapping, moment, objects, text
from flowbridge.sources.report import FIRING, PAUSED, RESOLVED, report, words
from flowbridge.sources.source import Headers, Incoming, Notice, Source, State, UnrecognisedError

_STATES: dict[Any, tuple[str, str, State]] = {
    0: (FIRING, "down", "firing"),
    1: (RESOLVED, "up", "resolved"),
    2: ("", "pending", ""),
    3: (PAUSED, "under maintenance", ""),
}
_URL = re.compile(
    r"(https?://)(?:[^/?#@]*@)?([^/?#@\s][^?#@\s]*)", re.IGNORECASE
)  # no password, and no token in a query


def recognises(headers: Headers, payload: Any) -> bool:
    return {"heartbeat", "monitor", "msg"} <= mapping(payload).keys()


def read(incoming: Incoming) -> Sequence[Notice]:
    payload = incoming.payload
    heartbeat, monitor = mapping(payload, "heartbeat"), mapping(payload, "monitor")
    said = text(payload, "msg")
    if not heartbeat:
        if not said.strip():
            raise UnrecognisedError("it has neither a heartbeat nor a message")
        return [Notice(event="message", view={"report": report("Uptime Kuma", text=said)})]
    status = at(heartbeat, "status")
    mark, outcome, state = _STATES.get(status if isinstance(status, int) else None, ("", text(heartbeat, "status"), ""))
    ping = text(heartbeat, "ping")
    time = at(heartbeat, "time")  # UTC, without saying so
    key = text(monitor, "id") or text(heartbeat, "monitorID")
    return [
        Notice(
            event=outcome.replace("under ", ""),
            view={
                "report": report(
                    text(monitor, "pathName") or text(monitor, "name") or f"Monitor {key}",
                    mark=mark,
                    outcome=outcome,
                    text=text(heartbeat, "msg") or said,
                    facts=[
                        ("where", _where(monitor)),
                        ("ping", f"{ping} ms" if ping else ""),
                        *((text(tag, "name"), text(tag, "value") or "yes") for tag in objects(monitor, "tags")),
                    ],
                    since=time,
                )
            },
            key=f"monitor:{key}" if key else "",
            state=state,
            firing=("",) if state == "firing" else (),
            time=moment(time),
        )
    ]


def _where(monitor: Any) -> str:
    """Its URL, unless it is the editor's own beginning of one, or its host."""
    if found := _URL.match(text(monitor, "url")):
        return "".join(found.groups())
    return ":".join(filter(None, (text(monitor, "hostname"), text(monitor, "port"))))


SOURCE = Source(
    "uptime-kuma",
    "Uptime Kuma",
    recognises,
    read,
    words,
    sample={
        "heartbeat": {
            "monitorID": 10,
            "status": 0,
            "time": "2026-11-30 14:06:38.123",
            "msg": "connect ECONNREFUSED 192.0.2.7:443",
            "important": True,
            "duration": 60,
            "timezone": "Europe/Berlin",
            "timezoneOffset": "+01:00",
            "localDateTime": "2026-11-30 15:06:38",
        },
        "monitor": {
            "id": 10,
            "name": "Shop",
            "url": "https://shop.example.org/health",
            "hostname": None,
            "port": None,
            "type": "http",
            "tags": [{"name": "team", "value": "web", "color": "#059669"}],
        },
        "msg": "[Shop] [🔴 Down] connect ECONNREFUSED 192.0.2.7:443",
    },
    sample_headers={"User-Agent": "axios/1.7.7", "Content-Type": "application/json"},
)
