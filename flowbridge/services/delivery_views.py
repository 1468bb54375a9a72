"""How a delivery is shown, in HTTP and on the command line, and how a list of them is filtered."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from flowbridge.delivery.pending import Keeps
from flowbridge.delivery.waiting import Waiting
from flowbridge.errors import BadRequest
from flowbridge.models.hooks import OWNER
from flowbridge.store import clock
from flowbridge.store.contents import BLANK, OTHER_KEY, is_sealed
from flowbridge.store.json_columns import from_json

DELIVERY = re.compile(r"[A-Za-z0-9_~.-]{1,128}")  # an id that a delivery may have
MAX_NAMED = 100  # deliveries in one question
REFUSED = "refused"
STATES = ("sent", "queued", "dead", REFUSED)
MIN_TEXT, MAX_TEXT = 2, 200  # characters to search for

_TIME = re.compile(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}([T ][0-9:.,]{1,20}(Z|[+-][0-9:]{1,10})?)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AGE = re.compile(r"([0-9]{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SECONDS_SINCE_1970, _MS_SINCE_1970 = re.compile(r"[0-9]{9,10}"), re.compile(r"[0-9]{12,13}")


def summary(row: Mapping[str, Any], waiting: Waiting | None = None) -> dict[str, Any]:
    """A delivery as a list shows it, without the fields that it does not have, or not yet."""
    found = {
        "delivery_id": row["delivery"],
        "status": row["state"],
        "room_id": row["room_id"],
        "event_type": row["event_type"],
        "state_key": row["state_key"],
        "event_id": row["event_id"],
        "error": from_json(row["error"]) if row["error"] else None,
        "attempts": row["attempts"],
        "accepted_at": iso(row["accepted_at"]),
        "settled_at": iso(row["settled_at"]),
        "user_id": row["user_id"],
        **_sender(row["api_key"]),
        "key": row["caller_key"],
        "waiting": None if waiting is None else _waiting(waiting),
    }
    return without_none(found)


def _sender(api_key: str | None) -> dict[str, Any]:
    """A hook stands where events name an API key."""
    if api_key is not None and api_key.startswith(OWNER):
        return {"hook": api_key.removeprefix(OWNER)}
    return {"api_key": api_key}


def _waiting(waiting: Waiting) -> dict[str, Any]:
    return without_none({"reason": waiting.reason, "until": iso(waiting.until), "behind": waiting.behind})


def refused_summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """A call, or several alike, that were refused: nothing of their bodies is kept."""
    number = row["number"]
    found = {
        "delivery_id": row["delivery"],
        "status": REFUSED,
        "room_id": row["room_id"],
        "event_type": row["event_type"],
        "error": from_json(row["error"]),
        "attempts": 0,
        "refused_at": iso(row["refused_at"]),
        "last_refused_at": iso(row["last_at"]) if number > 1 else None,
        "count": number,
        "user_id": row["user_id"],
        **_sender(row["api_key"]),
        "address": row["address"],
    }
    return without_none(found)


def detail(row: Mapping[str, Any], waiting: Waiting | None = None) -> dict[str, Any]:
    """A delivery with its request as it came, its event as it is sent, and every attempt that is remembered.

    Without both once its content is not kept any more.
    """
    if lost(row):
        shown = {}
    else:
        event = {"type": row["event_type"], "state_key": row["state_key"], "content": from_json(row["content"])}
        request = row["content"] if row["request"] is None else row["request"]
        shown = {"request": request, "event": without_none(event)}
    return {
        **summary(row, waiting),
        **shown,
        "txn_id": row["txn_id"],
        "history": [_happened(entry) for entry in from_json(row["history"])],
    }


def lost(row: Mapping[str, Any], keeps: Keeps = "all") -> str:
    """Why a content cannot be shown, nor sent again; "" if it can. `keeps`: FLOWBRIDGE_KEEP_CONTENTS."""
    if row["content"] == BLANK:
        setting = "FLOWBRIDGE_KEEP_CONTENT_DAYS" if keeps == "all" else f"FLOWBRIDGE_KEEP_CONTENTS={keeps}"
        return f"its content is not kept any more ({setting})"
    return f"its content cannot be read: {OTHER_KEY}" if is_sealed(row["content"]) else ""


def _happened(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt, or a replay and what the delivery was before it."""
    found = {"time": iso(entry["at"]), "milliseconds": entry.get("ms")}
    found |= {name: entry.get(name) for name in ("status", "errcode", "error", "note")}
    if (was := entry.get("replayed")) is not None:
        found["replayed"] = without_none(
            {
                "by": was["by"],
                "status": was["state"],
                "event_id": was.get("event_id"),
                "txn_id": was["txn_id"],
                "accepted_at": iso(was["accepted_at"]),
            }
        )
    return without_none(found)


def states(text: str, name: str) -> tuple[str, ...]:
    """States with commas between them. Raises BadRequest, which names the parameter."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for state in found:
        if state not in STATES:
            raise BadRequest(f"{name}: {state[:80]!r} is none of {', '.join(STATES)}")
    return found


def deliveries(text: str, name: str) -> tuple[str, ...]:
    """Ids of deliveries with commas between them. Raises BadRequest, which names the parameter."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(found) > MAX_NAMED:
        raise BadRequest(f"{name}: at most {MAX_NAMED} deliveries can be named, not {len(found)}")
    for delivery in found:
        if not DELIVERY.fullmatch(delivery):
            raise BadRequest(f"{name}: {delivery[:80]!r} is not the id of a delivery")
    return found


def text(searched: str, name: str) -> str:
    """Part of a content. Raises BadRequest, which names the parameter."""
    if not MIN_TEXT <= len(searched) <= MAX_TEXT:
        raise BadRequest(f"{name}: it takes {MIN_TEXT} to {MAX_TEXT} characters to search for, not {len(searched)}")
    return searched


def age(text: str) -> int | None:
    """The time that was so long ago (`90m`, `7d`), as ms since 1970; None for what is no age."""
    found = _AGE.fullmatch(text.strip())
    return clock.now_ms() - int(found[1]) * _SECONDS[found[2]] * 1000 if found else None


def since(text: str, name: str) -> int:
    """A time, an age, or seconds or milliseconds since 1970, as ms since 1970. Raises BadRequest."""
    text = text.strip()
    if (ago := age(text)) is not None:
        return ago
    if _SECONDS_SINCE_1970.fullmatch(text):
        return int(text) * 1000
    if _MS_SINCE_1970.fullmatch(text):
        return int(text)
    try:
        return moment(text, name)
    except BadRequest as error:
        raise BadRequest(f"{error.error}, like 2h or 7d for so long ago, or as seconds since 1970") from None


def moment(text: str, name: str) -> int:
    """A time in ISO 8601 as ms since 1970; UTC where it has no offset. Raises BadRequest."""
    text = text.strip()
    if "T" in text:
        text = text.replace(" ", "+")  # what a `+` becomes that was not percent-encoded
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        found = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest(f"{name}: {text[:80]!r} is not a time: write it like 2026-11-22T10:00:00Z") from None
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    return (found - _EPOCH) // timedelta(milliseconds=1)


def iso(ms: int | None) -> str | None:
    """ISO 8601, UTC, with milliseconds."""
    if ms is None:
        return None
    return (_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
