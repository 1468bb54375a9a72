"""How requests and answers change that pass through to and from the homeserver. Pure.

Everything else stays byte for byte: the path (`%2F`, trailing slashes), the query except `;`, the bodies.
"""

import math
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote_plus, unquote_to_bytes

from flowbridge.errors import BadRequest, NotJson

Headers = list[tuple[bytes, bytes]]

MAX_POLL_SECONDS: Final = 3_600.0  # the longest `timeout=` that is believed

# RFC 9110 §7.6.1, and the older names for the same
_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
# Written again (host, authorization, content-length), answered here (expect), or private to this hop. Referer may hold
# an access token.
_NOT_UP: Final = _HOP_BY_HOP | frozenset(
    b"host authorization content-length expect cookie x-api-key referer forwarded x-real-ip".split()
)
# date: the server writes its own. The others are about the origin of the connection, which is another one here.
_NOT_DOWN: Final = _HOP_BY_HOP | frozenset(b"date set-cookie alt-svc strict-transport-security".split())

_OLD_DIALECT: Final = re.compile(r"/_matrix/(?:(client)/(?:api/v1|r0)|(media)/(?:v1(?!/create)|r0))/")
_ENDS_TOKENS: Final = re.compile(
    r"/_matrix/client/(?:api/v1|r0|v[0-9]+|unstable)/"
    r"(?:account/(?:password|deactivate)|delete_devices|devices/[^/]+|logout/all)/?"
)
# `;` is part of a value (URL standard), but was once a separator: Twisted, and so Synapse, still splits at it. Synapse
# would see a parameter behind it that nothing here has checked.
_NOT_ON_THE_WIRE: Final = re.compile(rb"[^\x21-\x7e]|;")
# Where a float may be too large, or a surrogate alone: hardly any body has it. Three patterns, since one with
# alternatives takes 10 times as long: it has no set of first bytes to search for.
_SUSPICIOUS: Final = (re.compile(rb"[eE]\+?[0-9]{3}"), re.compile(rb"[0-9]{200}"), re.compile(rb"\\u[dD]"))
_QUOTE: Final = ord('"')
_PIECE: Final = 64 * 1024  # bytes searched in one go: 2 ms, in which no other thread runs
# Possessive (`++`): a string that does not end takes time in proportion to its length, and no memory. One match covers
# 256 KiB at most, during which no other thread runs. Pairs of surrogates, and numbers below 1e308, are right.
_HEX: Final = "[0-9a-fA-F]"
_PAIR: Final = rf"\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}"
_STRICT_ESCAPE: Final = rf"\\(?!u[dD][89a-fA-F]).|{_PAIR}"
_STRICT_NUMBER: Final = (
    r"-?[0-9]{1,200}+(?:\.[0-9]++)?+(?:[eE](?:-[0-9]++|\+?(?=[0-9])0*+[0-9]{0,2}+))?+(?![0-9.eE])"
    r"|-?[0-9](?:\.[0-9]++)?+[eE]\+?0*+(?:[12][0-9]{2}|30[0-7])(?![0-9.eE])"
)
_ANY_ESCAPE: Final = r"\\."
_ANY_NUMBER: Final = r"-?[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_NUMBER: Final = re.compile(_ANY_NUMBER.encode())
_LONE: Final = re.compile(rf"\\u[dD][89a-fA-F]{_HEX}{{2}}".encode())
MAX_NEAR_THE_LIMIT: Final = 10_000  # numbers that are checked one by one


class _Grammar:
    """Patterns for as many tokens of JSON, or as much of a string, as there are in one go."""

    def __init__(self, escape: str, number: str) -> None:
        piece = rf'[^"\\]{{1,64}}+|{escape}'
        string = rf'"(?:{piece}){{0,32}}+"'
        tokens = rf"(?:[][{{}}:, \t\r\n]{{1,256}}+|{string}|{number}|true|false|null){{1,128}}+"
        self.outside = re.compile(tokens.encode(), re.DOTALL)
        self.inside = re.compile(rf"(?:{piece}){{1,1024}}+".encode(), re.DOTALL)


_STRICT: Final = _Grammar(_STRICT_ESCAPE, _STRICT_NUMBER)
_LENIENT: Final = _Grammar(_ANY_ESCAPE, _ANY_NUMBER)
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")


def target(path: str, query: bytes) -> str:
    """Path and query for the homeserver. Raises BadRequest.

    `api/v1` and `r0`, of media `v1` and `r0`, become v3, which has all that they had: current homeservers do not answer
    every path in the old versions. `unstable`, the client API's `v1` and `media/v1/create` name other things, and stay.
    A path that would climb out of `/_matrix/` behind some proxy is refused, and so is one that is not text.
    """
    decoded = unquote_to_bytes(path)
    try:
        decoded.decode()
    except UnicodeDecodeError:
        raise BadRequest("the path is not UTF-8") from None
    if _CONTROL.search(decoded):
        raise BadRequest("the path holds a control character")
    if not {b".", b".."}.isdisjoint(decoded.split(b"/")):
        raise BadRequest("the path holds a '.' or '..' segment")
    if old := _OLD_DIALECT.match(path):
        path = f"/_matrix/{old[1] or old[2]}/v3/{path[old.end() :]}"
    kept = b"&".join(part for part in query.split(b"&") if _is_kept(part))
    if not kept:
        return path
    return f"{path}?{_NOT_ON_THE_WIRE.sub(_encoded, kept).decode('ascii')}"


def ends_tokens(method: str, path: str) -> bool:
    """Whether a request, if it succeeds, may end tokens of its user: all, or those of other devices."""
    if method not in ("POST", "DELETE"):
        return False
    return bool(_ENDS_TOKENS.fullmatch(unquote_to_bytes(path).decode("utf-8", "replace")))


def poll_seconds(query: bytes) -> float:
    """For how long a long poll asks the homeserver to wait (`timeout=`, in milliseconds)."""
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"timeout" and value.isdigit():
            return min(int(value[:12]) / 1000, MAX_POLL_SECONDS)
    return 0.0


def request_headers(headers: Iterable[tuple[bytes, bytes]], token: str | None, *, has_body: bool) -> Headers:
    """The headers for the homeserver; names are in lower case. The HTTP client adds Host.

    Raises BadRequest for a media type that is not ASCII.
    """
    headers = list(headers)
    if not all(value.isascii() for name, value in headers if name == b"content-type"):
        raise BadRequest("Content-Type: it is not ASCII")
    dropped = _NOT_UP | _named(headers)
    found = [(name, value) for name, value in headers if name not in dropped and not name.startswith(b"x-forwarded-")]
    if token is not None:
        found.append((b"authorization", b"Bearer " + token.encode("ascii")))
    if has_body:
        found += [(name, value) for name, value in headers if name == b"content-length"]
    return found


def answer_headers(headers: Iterable[tuple[bytes, bytes]], status: int = 200) -> Headers:
    """The headers for the caller; names are in lower case.

    Without a length where there is no body: a 304 may name the length that the body would have (RFC 9110 §8.6), and the
    server would wait for it.
    """
    headers = list(headers)
    dropped = _NOT_DOWN | _named(headers)
    if status in (204, 304):
        dropped |= {b"content-length"}
    return [(name, value) for name, value in headers if name not in dropped and not _CONTROL.search(value)]


def is_suspicious(body: bytes) -> bool:
    """Whether `check_body` has to read the body, as for hardly any."""
    pieces = range(0, len(body), _PIECE)
    return any(pattern.search(body, at, at + _PIECE + 200) for at in pieces for pattern in _SUSPICIOUS)


def check_body(body: bytes) -> None:
    """Raises NotJson for JSON to which a homeserver answers 500: `1e400`, lone surrogates (contract §4, 14).

    The homeserver reports other faults itself, and better; a body that is not JSON may be what it asks for. Regular
    expressions do the work: 8 MB take 0.2 s at most, and took up to 38 s token by token in Python.
    """
    if is_suspicious(body) and (fault := _fault(body)):
        raise NotJson(f"the body holds {fault}")


def _fault(body: bytes) -> str:
    """What is wrong with a body that consists of JSON tokens to its end; "" for any other body, or for no fault."""
    grammar, fault, near = _STRICT, "", 0
    at, is_inside = 0, False
    while at < len(body):
        found = (grammar.inside if is_inside else grammar.outside).match(body, at)
        if found is not None:
            at = found.end()
        elif body[at] == _QUOTE:
            at, is_inside = at + 1, not is_inside
        elif is_inside:  # a backslash: the last byte, or before something that is not a pair of surrogates
            if at + 1 == len(body):
                return ""
            if _LONE.match(body, at):
                grammar, fault = _LENIENT, "a lone surrogate, which is not Unicode text"
            at += 2
        elif (number := _NUMBER.match(body, at)) is not None:
            at, near = number.end(), near + 1
            if not number[0].lstrip(b"-").isdigit() and (near > MAX_NEAR_THE_LIMIT or math.isinf(float(number[0]))):
                grammar, fault = _LENIENT, f"{number[0][:40].decode()}, which is too large for a number"
        else:
            return ""
    return "" if is_inside else fault


def _named(headers: Headers) -> set[bytes]:
    """The headers that `Connection` reserves for the next hop."""
    return {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}


def _is_kept(part: bytes) -> bool:
    """A token is sent in a header only; a blank value means that the parameter is absent."""
    name, equals, value = part.partition(b"=")
    if not name or (equals and not value):
        return False
    return unquote_plus(name.decode("latin-1")).strip().lower() != "access_token"


def _encoded(found: "re.Match[bytes]") -> bytes:
    return b"%%%02X" % found[0][0]
