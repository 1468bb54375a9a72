"""A request that offers to upgrade its connection is read as if it did not: a server may ignore it (RFC 9110 §7.8).

llhttp takes what follows a head with `Upgrade` and `Connection: upgrade` for another protocol, even a body; and Java's
HTTP client offers h2c with its first request. No option of the parser changes that. Nor may the caller's bytes be
changed: renaming the header by a search in them changed a body when a TCP segment ended in the blank line. So a second
parser reads on behind the head. It is first fed a head of ours with the same framing, made from the parsed headers.
"""

from collections.abc import Iterable
from typing import Protocol

import httptools

_FRAMING = frozenset((b"content-length", b"transfer-encoding"))


class Callbacks(Protocol):
    """The callbacks of a parser, which have been called for the head already."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


def parser(callbacks: object) -> httptools.HttpRequestParser:
    """A parser with uvicorn's options: bytes behind the last request of a connection are not an error."""
    made = httptools.HttpRequestParser(callbacks)
    made.set_dangerous_leniencies(lenient_data_after_close=True)
    return made


def successor(callbacks: Callbacks) -> httptools.HttpRequestParser:
    """The parser to be fed `head()`, then all that follows the head with the offer."""
    return parser(_Behind(callbacks))


def head(method: bytes, headers: Iterable[tuple[bytes, bytes]], *, keep_alive: bool) -> bytes:
    """A head that frames the body as these headers do (lower-case names), without the offer."""
    lines = [b"%b / HTTP/1.1" % method]
    lines += [b"%b: %b" % (name, value) for name, value in headers if name in _FRAMING]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"", b""])


class _Behind:
    """Passes on all but the first head. The first message may end with that, so `on_message_complete` always passes."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._to = callbacks
        self._is_behind = False
        self.on_body = callbacks.on_body
        self.on_message_complete = callbacks.on_message_complete

    def on_message_begin(self) -> None:
        if self._is_behind:
            self._to.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_behind:
            self._to.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_behind:
            self._to.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_behind:
            self._to.on_headers_complete()
        self._is_behind = True
