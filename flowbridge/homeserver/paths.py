"""Matrix paths: how they are written for the homeserver, and which segments may stand in them. Pure.

A caller may speak `api/v1`, `r0`, `v3` or `unstable`; the homeserver is always spoken to in v3.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from unicodedata import category
from urllib.parse import quote, unquote_to_bytes, urlencode

from flowbridge.errors import BadRequest

_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*")  # RFC 3986: what is never encoded

_PAGE_TOKEN = re.compile(r"\At[0-9]+-(?=[0-9]+(?:_|\Z))")
_LONG_NUMBER = re.compile(r"[0-9]{19,}")

MAX_BYTES = 255  # of an identifier (specification, appendix "Identifier grammar")
CLIENT = "/_matrix/client/v3"


@lru_cache(4_096)
def segment(raw: str, what: str, *, empty: bool = False) -> str:
    """One path segment, percent-decoded and checked as `identifier` does. Raises BadRequest."""
    try:
        return identifier(unquote_to_bytes(raw).decode() if "%" in raw else raw, what, empty=empty)
    except UnicodeDecodeError:
        raise BadRequest(f"the {what} is not UTF-8") from None


def identifier(text: str, what: str, *, empty: bool = False) -> str:
    """What may go into a path on the way to the homeserver. Raises BadRequest for the rest.

    `.` and `..` are refused even when they came encoded: proxies and clients collapse them, and the request would
    go to another path than the one that was meant.
    """
    if not text and not empty:
        raise BadRequest(f"the {what} is empty")
    if text in (".", ".."):
        raise BadRequest(f"the {what} may not be {text!r}")
    if not text.isprintable() and any(category(character) in ("Cc", "Cs") for character in text):
        raise BadRequest(f"the {what} holds a control character")
    if len(text) > MAX_BYTES or (not text.isascii() and len(text.encode()) > MAX_BYTES):
        raise BadRequest(f"the {what} is longer than {MAX_BYTES} bytes")
    return text


def room(raw: str) -> str:
    """A room id (`!…`, with or without a domain) or an alias (`#name:server`)."""
    text = segment(raw, "room")
    if text[0] == "!" and len(text) > 1:
        if "/" in text:
            raise BadRequest("a room id holds no '/'")
        return text
    if text[0] == "#":
        name, colon, server = text[1:].partition(":")
        if name and colon and server:
            return text
        raise BadRequest(f"{text!r} is not a room alias: it has the form #name:server")
    raise BadRequest(f"{text[:80]!r} is not a room: a room id begins with '!', an alias with '#'")


def event_type(raw: str) -> str:
    text = segment(raw, "event type")
    if "/" in text:
        raise BadRequest("an event type holds no '/'")
    return text


def send_target(room_id: str, type_: str, txn_id: str) -> str:
    return f"{CLIENT}/rooms/{_q(room_id)}/send/{_q(type_)}/{quote(txn_id, safe='')}"


def redact_target(room_id: str, event_id: str, txn_id: str) -> str:
    return f"{CLIENT}/rooms/{_q(room_id)}/redact/{quote(event_id, safe='')}/{quote(txn_id, safe='')}"


def state_target(room_id: str, type_: str, state_key: str) -> str:
    return f"{CLIENT}/rooms/{_q(room_id)}/state/{_q(type_)}/{_q(state_key)}"


def room_target(room_id: str, what: str, query: Mapping[str, str]) -> str:
    """What there is to read of a room: members, joined_members, messages or state."""
    return f"{CLIENT}/rooms/{_q(room_id)}/{what}{_query(query)}"


def token(text: str, what: str) -> str:
    """A token of the homeserver's. Raises BadRequest for numbers that no database holds: a 500 of Synapse."""
    if any(int(digits[:20]) >= 2**63 for digits in _LONG_NUMBER.findall(text)):
        raise BadRequest(f"{what}: {text[:80]!r} is not a token")
    return text


def stream_token(token: str) -> str:
    """A token of a page of messages as a sync takes it: Synapse's hold the place in the stream behind a dash."""
    return _PAGE_TOKEN.sub("s", token)


def sync_target(query: Mapping[str, str]) -> str:
    return f"{CLIENT}/sync{_query(query)}"


def alias_target(alias: str) -> str:
    return f"{CLIENT}/directory/room/{_q(alias)}"


def listing_target(room_id: str) -> str:
    return f"{CLIENT}/directory/list/room/{_q(room_id)}"


def join_target(room_or_alias: str) -> str:
    return f"{CLIENT}/join/{_q(room_or_alias)}"


def member_target(room_id: str, action: str) -> str:
    """`action`: join, invite, leave, kick, ban or unban."""
    return f"{CLIENT}/rooms/{_q(room_id)}/{action}"


def _query(query: Mapping[str, str]) -> str:
    return f"?{urlencode(query, quote_via=quote)}" if query else ""


@lru_cache(4_096)
def _q(text: str) -> str:
    return text if _UNRESERVED.fullmatch(text) else quote(text, safe="")
