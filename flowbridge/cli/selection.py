"""The deliveries that the options of `flowbridge deliveries` select."""

import re
from collections.abc import Sequence

from flowbridge.cli import Usage
from flowbridge.errors import BadRequest
from flowbridge.homeserver import identifiers
from flowbridge.services.delivery_views import moment, states
from flowbridge.store import clock
from flowbridge.store.delivery_log import Selection

_AGE = re.compile(r"([0-9]{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def select(*, state: Sequence[str] = (), room: str = "", event_type: str = "", since: str = "") -> Selection:
    """Raises Usage."""
    try:
        return Selection(
            states=states(",".join(state), "--state"),
            room_id=identifiers.identifier(room, "--room") if room else None,
            event_type=identifiers.identifier(event_type, "--type") if event_type else None,
            since=_time(since, "--since") if since else None,
        )
    except BadRequest as error:
        raise Usage(error.error) from None


def ago(text: str, option: str) -> int:
    """The time that was so long ago (`90m`, `7d`), as ms since 1970. Raises Usage."""
    if (found := _AGE.fullmatch(text)) is None:
        raise Usage(f"{option}: {text[:80]!r} is not an age: write it like 90m, 12h or 7d")
    return clock.now_ms() - int(found[1]) * _SECONDS[found[2]] * 1000


def _time(text: str, option: str) -> int:
    if _AGE.fullmatch(text):
        return ago(text, option)
    try:
        return moment(text, option)
    except BadRequest as error:
        raise Usage(f"{error.error}, or like 2h or 7d") from None
