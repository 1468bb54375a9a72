"""Identifiers in a request: what may go into a path on its way to the homeserver. Pure."""

import re
from functools import lru_cache
from unicodedata import category
from urllib.parse import unquote_to_bytes

from flowbridge.errors import BadRequest

MAX_BYTES = 255  # of an identifier (specification, appendix "Identifier grammar")

_LONG_NUMBER = re.compile(r"[0-9]{19,}")
_PAGE_TOKEN = re.compile(r"\At[0-9]+-(?=[0-9]+(?:_|\Z))")


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


def room_or_user(raw: str) -> str:
    """As `room`, or a user id (`@name:server`): the direct room with that user."""
    if not raw.startswith(("@", "%40")):
        return room(raw)
    text = segment(raw, "user id")
    name, colon, server = text[1:].partition(":")
    if name and colon and server and "/" not in server:
        return text
    raise BadRequest(f"{text!r} is not a user id: it has the form @name:server")


def event_type(raw: str) -> str:
    text = segment(raw, "event type")
    if "/" in text:
        raise BadRequest("an event type holds no '/'")
    return text


def token(text: str, what: str) -> str:
    """A token of the homeserver's. Raises BadRequest for numbers that no database holds: a 500 of Synapse."""
    if any(int(digits[:20]) >= 2**63 for digits in _LONG_NUMBER.findall(text)):
        raise BadRequest(f"{what}: {text[:80]!r} is not a token")
    return text


def stream_token(token: str) -> str:
    """A token of a page of messages as a sync takes it: Synapse's hold the place in the stream behind a dash."""
    return _PAGE_TOKEN.sub("s", token)
