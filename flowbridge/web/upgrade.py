"""A request that offers to upgrade its connection, read as if it did not: RFC 9110 §7.8 lets a server ignore the offer.

llhttp takes whatever follows a head with `Upgrade` and `Connection: upgrade` for another protocol, also when the
request has a body; Java's HTTP client offers h2c with its first request. The parser cannot be told otherwise, and the
caller's bytes must not be changed: an earlier version renamed the header by a search in the bytes, and where a TCP
segment ended in the blank line, it changed the body. So a second parser goes on behind the head. It is first given a
head of our own that says the same about the length, made from the headers as the first parser read them.
"""

from collections.abc import Iterable
from typing import Protocol

import httptools

_FRAMING = frozenset((b"content-length", b"transfer-encoding"))


class Callbacks(Protocol):
    """What a parser calls, and has called for the head already."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


def parser(callbacks: object) -> httptools.HttpRequestParser:
    """A parser as uvicorn makes them: what comes behind a request that ends the connection is not an error."""
    made = httptools.HttpRequestParser(callbacks)
    made.set_dangerous_leniencies(lenient_data_after_close=True)
    return made


def successor(callbacks: Callbacks) -> httptools.HttpRequestParser:
    """The parser that is to be given `head()`, then all that comes behind the head with the offer."""
    return parser(_Behind(callbacks))


def head(method: bytes, headers: Iterable[tuple[bytes, bytes]], *, keep_alive: bool) -> bytes:
    """A head of the same length as the one with these headers (lower-case names), without the offer."""
    lines = [b"%b / HTTP/1.1" % method]
    lines += [b"%b: %b" % (name, value) for name, value in headers if name in _FRAMING]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"", b""])


class _Behind:
    """Passes on all but the first head. The first message may end with it, so that its end is always passed on."""

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
