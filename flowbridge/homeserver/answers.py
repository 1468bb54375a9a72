"""What an answer of the homeserver means. Pure: an answer in, an event id or an error out."""

import re
import time
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from flowbridge.errors import BadGateway, Errcode, GatewayTimeout, HomeserverError, MatrixError
from flowbridge.homeserver import large_json
from flowbridge.homeserver.connection import NoAnswer, TimedOut
from flowbridge.homeserver.pool import Answer

MIN_PAUSE_MS = 500  # a 429 that names no time
MAX_PAUSE_MS = 600_000
_EVENT_ID = re.compile(rb'\{"event_id": ?"([!-!#-\[\]-~]+)"\}')  # without an escape: read 10 times as fast as any JSON
MAX_ERROR_BYTES = 64 * 1024  # a longer body is not a Matrix error, and reading it would hold up the event loop


def event_id(answer: Answer) -> str:
    """The event id of a send that was accepted. Raises MatrixError for every other answer."""
    if answer.status == 200:
        if usual := _EVENT_ID.fullmatch(answer.body):
            return usual[1].decode()
        value = (_object(answer) or {}).get("event_id")
        if isinstance(value, str) and value and value.isprintable():  # else a database may refuse it
            return value
        raise _strange("the homeserver answered 200 without an event_id: is BASE_URL a Matrix homeserver?")
    raise error(answer)


def success(answer: Answer) -> dict[str, Any]:
    """The JSON object of a 200. Raises MatrixError for every other answer."""
    found = _object(answer)
    if answer.status != 200 or found is None:
        raise error(answer)
    return found


def challenge(answer: Answer) -> dict[str, Any] | None:
    """The stages that a 401 asks for (specification, "User-Interactive Authentication API")."""
    found = _object(answer) if answer.status == 401 else None
    return found if found is not None and isinstance(found.get("flows"), list) else None


def error(answer: Answer) -> MatrixError:
    """The homeserver's own error as it came; a 502 for an answer that no homeserver would give."""
    found = (_object(answer) if len(answer.body) <= MAX_ERROR_BYTES else None) or {}
    errcode = found.pop("errcode", None)
    text = found.pop("error", None)
    if answer.status == 429:
        found["retry_after_ms"] = pause_ms(answer, found.get("retry_after_ms"))
        errcode = errcode if isinstance(errcode, str) else Errcode.LIMIT_EXCEEDED.value
    if isinstance(errcode, str) and 400 <= answer.status < 600:
        found = {key: value for key, value in found.items() if key not in ("status", "self")}
        text = text if isinstance(text, str) else errcode
        return HomeserverError(text, errcode=errcode, status=answer.status, **found)
    media_type = answer.header(b"content-type").partition(";")[0] or "no content type"
    return _strange(
        f"the homeserver answered {answer.status} with no Matrix error ({media_type}): is BASE_URL right, "
        "and does a proxy in between work?"
    )


def _strange(text: str) -> MatrixError:
    """An answer that no homeserver would give: a server is there, and may have passed the request on."""
    error = BadGateway(text)
    error.sent = True
    return error


def no_answer(failure: NoAnswer) -> MatrixError:
    """The error for an exchange that brought no answer."""
    error = GatewayTimeout(str(failure)) if isinstance(failure, TimedOut) else BadGateway(str(failure))
    error.sent = failure.sent
    return error


def pause_ms(answer: Answer, named: Any = None) -> int:
    """How long a 429 asks to wait, in milliseconds: the longer of `retry_after_ms` and `Retry-After`."""
    from_body = named if isinstance(named, int) and not isinstance(named, bool) else 0
    pause = max(from_body, _retry_after_ms(answer.header(b"retry-after")))
    return min(pause, MAX_PAUSE_MS) if pause > 0 else MIN_PAUSE_MS


def _retry_after_ms(value: str) -> int:
    """RFC 9110: seconds, or a date."""
    if value.isascii() and value.isdigit():
        return int(value[:9]) * 1000
    try:
        return int((parsedate_to_datetime(value).timestamp() - time.time()) * 1000)
    except (ValueError, TypeError, OverflowError):
        return 0


def _object(answer: Answer) -> dict[str, Any] | None:
    """The JSON object that the answer holds; None when it holds none."""
    try:
        value = large_json.read(answer.body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with an event after an attempt (design "Verdicts": only a Matrix errcode may kill an event).

    sent: `event_id` is its id. dead: the homeserver refuses it for good. forbidden: likewise, by 403 M_FORBIDDEN.
    absent: forbidden because the account is not in the room. again: the outcome is unknown, or a later attempt may
    succeed. slow: the account has to pause for `pause_ms`. token: the account's token is not accepted. account: the
    homeserver refuses the account, or currently everything, and not this event; `pause_ms` is how long it asks to wait,
    0 when it does not say. elsewhere: another process of the bridge can send it, this one cannot.

    `beforehand`: this answered a question that came before the send itself.
    """

    kind: Literal["sent", "dead", "forbidden", "absent", "again", "slow", "token", "account", "elsewhere"]
    event_id: str = ""
    error: MatrixError | None = None
    pause_ms: int = 0
    beforehand: bool = False


def _named_ms(refusal: MatrixError) -> int:
    """The pause that an error names, in milliseconds; 0 for none."""
    named = refusal.extra.get("retry_after_ms")
    return min(max(0, named), MAX_PAUSE_MS) if isinstance(named, int) and not isinstance(named, bool) else 0


_TOKEN_ERRCODES = frozenset({"M_UNKNOWN_TOKEN", "M_MISSING_TOKEN", "M_USER_LOCKED"})

# These would be the answer to any event. They once killed 50 of 50 queued events in 12 s.
_ACCOUNT_ERRCODES = _TOKEN_ERRCODES | {
    "M_CONSENT_NOT_GIVEN",
    "M_RESOURCE_LIMIT_EXCEEDED",
    "M_UNAUTHORIZED",
    "M_USER_AWAITING_APPROVAL",
    "M_USER_DEACTIVATED",
    "M_USER_LIMIT_EXCEEDED",
    "M_USER_SUSPENDED",
    "ORG.MATRIX.MSC3823.USER_ACCOUNT_SUSPENDED",  # M_USER_SUSPENDED before Matrix 1.13
    "ORG_MATRIX_EXPIRED_ACCOUNT",  # Synapse's account validity
}
_ACCOUNT_STATUSES = frozenset({401, 408, 409, 425})  # not authenticated, too slow, in conflict, too early


def judge(answer: Answer) -> Verdict:
    """The verdict on the answer to a send."""
    try:
        return Verdict("sent", event_id(answer))
    except MatrixError as refusal:
        found = refused(refusal)
        if found.kind == "account" and not found.pause_ms:
            found = replace(found, pause_ms=min(_retry_after_ms(answer.header(b"retry-after")), MAX_PAUSE_MS))
        return found


def refused(refusal: MatrixError) -> Verdict:
    """The verdict on an error: the homeserver's, or that it gave no answer."""
    if refusal.status == 429 or (refusal.errcode == Errcode.LIMIT_EXCEEDED and 400 <= refusal.status < 500):
        return Verdict("slow", error=refusal, pause_ms=_named_ms(refusal) or MIN_PAUSE_MS)
    if not isinstance(refusal, HomeserverError) or refusal.status >= 500 or refusal.errcode == Errcode.UNRECOGNIZED:
        return Verdict("again", error=refusal)
    if refusal.status == 401 and refusal.errcode in _TOKEN_ERRCODES:
        return Verdict("token", error=refusal)
    if refusal.status in _ACCOUNT_STATUSES or refusal.errcode in _ACCOUNT_ERRCODES:
        return Verdict("account", error=refusal, pause_ms=_named_ms(refusal))
    if refusal.status == 403 and refusal.errcode == Errcode.FORBIDDEN:
        return Verdict("forbidden", error=refusal)
    return Verdict("dead", error=refusal)
