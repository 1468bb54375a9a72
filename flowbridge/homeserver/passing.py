"""What changes in a request, and in an answer, that passes through to and from the homeserver. Pure.

Everything else stays byte for byte: the path (`%2F`, trailing slashes), the query, the bodies.
"""

import json
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
# Made anew (host, authorization, content-length), answered here (expect), or nobody else's business. Referer: it may
# hold an access token. x-offered: an Upgrade that nobody took (flowbridge.serve).
_NOT_UP: Final = _HOP_BY_HOP | frozenset(
    b"host authorization content-length expect cookie x-api-key referer forwarded x-real-ip x-offered".split()
)
# date: the server's own. The others are about the connection's origin, which is another one here.
_NOT_DOWN: Final = _HOP_BY_HOP | frozenset(b"date set-cookie alt-svc strict-transport-security".split())

_OLD_DIALECT: Final = re.compile(r"/_matrix/(?:(client)/(?:api/v1|r0)|(media)/(?:v1(?!/create)|r0))/")
_ENDS_TOKENS: Final = re.compile(
    r"/_matrix/client/(?:api/v1|r0|v[0-9]+|unstable)/"
    r"(?:account/(?:password|deactivate)|delete_devices|devices/[^/]+|logout/all)/?"
)
_NOT_ON_THE_WIRE: Final = re.compile(rb"[^\x21-\x7e]")
# Where a float may be too large, or a surrogate alone: nearly no body has it.
_SUSPICIOUS: Final = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{200}|\\u[dD]")
_PIECE: Final = 64 * 1024  # bytes looked into in one go: 2 ms, in which no other thread has its turn
# Without going back (`++`): a string that does not end takes its length in time, and no memory.
_TOKEN: Final = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"|-?[0-9]++(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|[][{}:, \t\r\n]++|true|false|null', re.DOTALL
)
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")


def target(path: str, query: bytes) -> str:
    """Path and query for the homeserver. Raises BadRequest.

    `api/v1` and `r0`, of media `v1` and `r0`, become v3, which has all that they had: current homeservers do not answer
    every path in the old dialects. `unstable`, the client API's `v1` and `media/v1/create` name other things, and stay.
    A step that would climb out of `/_matrix/` behind some proxy is refused, and so is what is no text.
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
    """Whether a request that succeeds may end tokens of its user: all, or those of other devices."""
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
    """The headers for the homeserver; names come and go in lower case. Host is the client's to set.

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


def answer_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers for the caller; names come in lower case."""
    headers = list(headers)
    dropped = _NOT_DOWN | _named(headers)
    return [(name, value) for name, value in headers if name not in dropped and not _CONTROL.search(value)]


def check_body(body: bytes) -> None:
    """Raises NotJson for JSON to which a homeserver answers 500: `1e400`, lone surrogates (contract §4, 14).

    What is wrong in other ways the homeserver says itself, and better; what is no JSON may be what it asks for. It is
    looked at token by token, so that a large body takes no more memory, and other threads have their turn.
    """
    if not any(_SUSPICIOUS.search(body, at, at + _PIECE + 200) for at in range(0, len(body), _PIECE)):
        return
    at, fault = 0, ""
    while found := _TOKEN.match(body, at):
        at = found.end()
        fault = fault or _fault(found[0])
    if fault and at == len(body):
        raise NotJson(f"the body holds {fault}")


def _fault(token: bytes) -> str:
    """What is wrong with a token of JSON, or an empty string."""
    if token[:1] == b'"':
        return "a lone surrogate, which is not Unicode text" if b"\\u" in token and not _is_text(token) else ""
    number = token.lstrip(b"-")
    if number[:1].isdigit() and not number.isdigit() and math.isinf(float(token)):
        return f"{token[:40].decode()}, which is too large for a number"
    return ""


def _is_text(string: bytes) -> bool:
    """Whether a JSON string can be written as UTF-8; what is no JSON is not judged here."""
    try:
        json.loads(string).encode()
    except UnicodeEncodeError:
        return False
    except ValueError:
        return True
    return True


def _named(headers: Headers) -> set[bytes]:
    """What `Connection` says is for the next hop only."""
    return {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}


def _is_kept(part: bytes) -> bool:
    """A token goes as a header only; a blank value means that the parameter is absent."""
    name, equals, value = part.partition(b"=")
    if not name or (equals and not value):
        return False
    return unquote_plus(name.decode("latin-1")).strip().lower() != "access_token"


def _encoded(found: "re.Match[bytes]") -> bytes:
    return b"%%%02X" % found[0][0]
