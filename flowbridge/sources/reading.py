"""Reading what others send: no type can be relied on. Pure."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

_NUMBERS, _NESTING = (int, float), (dict, list)  # `int | float` would be made anew for each value: 0.1 µs
_GAP = re.compile(r" UTC$|(?<=:\d\d) (?=[+-])")  # GitLab writes `2026-08-12 15:23:28 UTC`, and `… 21:50:00 +0200`


def text(value: Any, *path: str) -> str:
    """The text at a path of keys; "" for what is not there, or is no text, number or boolean."""
    found = at(value, *path)
    if isinstance(found, str):
        return found
    if isinstance(found, bool):
        return "true" if found else "false"
    return str(found) if isinstance(found, _NUMBERS) else ""


def at(value: Any, *path: str) -> Any:
    """What is at a path of keys; None where there is nothing."""
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def mapping(value: Any, *path: str) -> Mapping[str, Any]:
    found = at(value, *path)
    return found if isinstance(found, dict) else {}


def items(value: Any, *path: str) -> list[Any]:
    found = at(value, *path)
    return found if isinstance(found, list) else []


def objects(value: Any, *path: str) -> Iterator[dict[str, Any]]:
    """The objects of a list; what else is in it is passed over."""
    return (item for item in items(value, *path) if isinstance(item, dict))


def parsed(value: Any) -> Any:
    """JSON inside of a text; the value itself where it is none, or nested too deeply."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def moment(value: Any) -> int | None:
    """Milliseconds since 1970 of an ISO 8601 text, or of a number of seconds or milliseconds; None for anything else.

    Go's zero time, the year 1, is none: Alertmanager writes it for what has not ended.
    """
    if isinstance(value, str):
        return _moment(value) if 10 <= len(value) <= 40 else None
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return None
    found = value if abs(value) > 1e11 else value * 1000
    return int(found) if 0 < found < 1e14 else None


@lru_cache(256)  # the alerts of a group began together, and a template shows what its source has read
def _moment(value: str) -> int | None:
    try:
        parsed = datetime.fromisoformat(_GAP.sub("", value))
    except ValueError:
        return None
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=UTC)
    return round(parsed.timestamp() * 1000) if parsed.year > 1970 else None


def dated(value: Any) -> str:
    """`2026-11-22 10:00 UTC`, of an ISO 8601 text or a number; what is neither stays as it is."""
    at = moment(value)
    if at is None:
        return plain(value)
    return _minute(at // 60_000)


@lru_cache(256)  # as above
def _minute(at: int) -> str:
    return f"{datetime.fromtimestamp(at * 60, UTC):%Y-%m-%d %H:%M} UTC"


def lasted(seconds: Any, until: Any = None) -> str:
    """`3 h 5 min`, of seconds, or from one moment until another."""
    if until is not None:
        start, end = moment(seconds), moment(until)
        if start is None or end is None:
            return ""
        seconds = (end - start) / 1000
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min"
    if whole < 86_400:
        hours, minutes = whole // 3_600, whole % 3_600 // 60
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = whole // 86_400, whole % 86_400 // 3_600
    return f"{days} d {hours} h" if hours else f"{days} d"


def plain(value: Any) -> str:
    """Any value as a template shows it."""
    if value is None or callable(value):
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def depth_of(value: Any, limit: int) -> int:
    """How many lists and objects are in one another; `limit` + 1 where there are more."""
    level = [value] if isinstance(value, _NESTING) else []
    for depth in range(limit + 1):
        if not level:
            return depth
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, _NESTING)
        ]
    return limit + 1
