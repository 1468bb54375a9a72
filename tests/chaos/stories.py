"""Stories that a hook is told, as Alertmanagers tell them, and whether its room shows each in one message.

A story turns in a circle of four events: an alert fires, another one joins it, the first is resolved, all are.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

TURN = 4
FIRING = ("a", "ab", "b", "")  # alerts, in each event of a turn
BEGINS = (0, 1)  # of a turn: something begins to fire, which no edit may hide

_BEGAN = datetime(2020, 1, 1, tzinfo=UTC)  # by the senders' clocks
_NUMBER = re.compile(r"\bevent ([0-9]+)\b")


def hook_of(room: str) -> str:
    """The name of the hook for a room."""
    return room.strip("!").partition(":")[0]


def secret_of(room: str) -> str:
    return f"fh_the-secret-of-the-hook-{hook_of(room)}"


def hooks(rooms: Iterable[str]) -> str:
    """hooks.yaml: a hook for each room."""
    found = [
        {
            "name": hook_of(room),
            "room": room,
            "source": "alertmanager",
            "mention": ["@oncall:chaos.test"],
            "verification": {"secret": secret_of(room)},
        }
        for room in rooms
    ]
    return json.dumps(found)


def body(room: str, n: int, member: int = 0) -> bytes:
    """Event number n of a room's story. `member`: of an HA pair, whose bodies are not quite the same."""
    turn, at = divmod(n, TURN)
    alerts = [_alert(name, turn, at) for name in sorted({*FIRING[at], *(FIRING[at - 1] if at else "")})]
    for alert in alerts:
        alert["annotations"] = {"summary": f"event {n}"}
    return json.dumps(
        {
            "version": "4",
            "receiver": "flowbridge",
            "status": "firing" if FIRING[at] else "resolved",
            "groupKey": f"{{}}:{{room={json.dumps(room)}}}",
            "groupLabels": {"alertname": "Chaos"},
            "commonLabels": {"alertname": "Chaos"},
            "commonAnnotations": {"summary": f"event {n}"},
            "externalURL": f"http://alertmanager-{member}.chaos.test:9093",
            "truncatedAlerts": 0,
            "alerts": alerts,
        }
    ).encode()


def _alert(name: str, turn: int, at: int) -> dict[str, Any]:
    fires = name in FIRING[at]
    began = _at(turn, BEGINS["ab".index(name)])
    return {
        "status": "firing" if fires else "resolved",
        "labels": {"alertname": "Chaos", "instance": name},
        "startsAt": began,
        "endsAt": "0001-01-01T00:00:00Z" if fires else _at(turn, at),
        "fingerprint": name * 16,
    }


def _at(turn: int, at: int) -> str:
    return (_BEGAN + timedelta(seconds=TURN * turn + at)).isoformat()


def number_of(content: Mapping[str, Any]) -> int | None:
    """Which event of a story this is, by what it shows."""
    found = _NUMBER.search(str(content.get("m.new_content", content).get("body", "")))
    return int(found[1]) if found else None


def offenders(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is not as it must be in the rooms of hooks: lines of the homeserver's log, in their order."""
    newest: dict[str, str] = {}
    found = []
    for event in events:
        relation, begins = event["relation"], event["n"] % TURN in BEGINS
        name = f"{event['room']}#{event['n']}"
        if begins and relation is not None:
            found.append(f"{name} begins, and is an edit of {relation}")
        elif not begins and relation is None:
            found.append(f"{name} is a first message, and nothing begins")
        elif not begins and relation != newest.get(event["room"]):
            found.append(f"{name} edits {relation}, and the newest is {newest.get(event['room'])}")
        if event["pings"] != begins:
            found.append(f"{name} {'pings' if event['pings'] else 'does not ping'}")
        if begins:
            newest[event["room"]] = event["event_id"]
    return found
