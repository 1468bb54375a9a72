"""What arrived in place of a request, in words: an address that is not encoded, or TLS on a port without it."""

import re
import time
from typing import Final
from urllib.parse import quote_from_bytes

from flowbridge import log

QUIET_SECONDS: Final = 60.0  # between two log lines: a client that speaks TLS tries again and again

_TLS = b"\x16\x03"  # the record of a ClientHello (RFC 8446 §5.1); no HTTP method begins so
_LINE = re.compile(rb"[A-Z]+ (?P<target>(?:/|https?://).*?)(?: HTTP/[0-9.]+)?\r?(?:\n|\Z)", re.DOTALL)
_RAW = re.compile(rb"[^\x21-\x7e]+")
MAX_SHOWN: Final = 24  # bytes


def is_tls(data: bytes) -> bool:
    return data.startswith(_TLS)


def reason(data: bytes) -> str:
    """Why these bytes, with which a request should have begun, are none."""
    if is_tls(data):
        return (
            "this port speaks http://, and the client https://: use http://, or put a proxy with TLS before flowbridge"
        )
    line = _LINE.match(data)
    raw = _RAW.search(line["target"]) if line else None
    if raw is None:
        return "this is not an HTTP/1.1 request"
    found = raw[0][:1] if raw[0] < b"\x80" else raw[0][:MAX_SHOWN].decode("utf-8", "ignore").encode()
    if not found:
        return "percent-encode the address, as UTF-8: \u00e9 is written %C3%A9"
    named = "a space" if found == b" " else found.decode() if found.decode().isprintable() else "a control character"
    return f"percent-encode the address: {named} in it is written {quote_from_bytes(found)}"


class Hellos:
    """Logs that clients spoke TLS."""

    def __init__(self) -> None:
        self._seen = 0
        self._quiet_until = 0.0

    def note(self, client: str) -> None:
        self._seen += 1
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            hint = "the bridge's address is http://; for https:// put a proxy with a certificate before it"
            log.warning("tls_on_http_port", client=client, refused=self._seen, hint=hint)
            self._seen = 0
