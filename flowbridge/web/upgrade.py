"""A request that offers to upgrade its connection is read as if it did not: a server may ignore it (RFC 9110 §7.8).

llhttp takes what follows a head with `Upgrade` and `Connection: upgrade` for another protocol, even a body; and Java's
HTTP client offers h2c with its first request. No option of the parser changes that. Nor may the caller's bytes be
changed: renaming the header by a search in them changed a body when a TCP segment ended in the blank line. So a second
parser reads on behind the head. It is first fed a head of ours with the same framing, made from the parsed headers.
"""

from collections.abc import Callable, Iterable

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_FRAMING = frozenset((b"content-length", b"transfer-encoding"))


def parser(callbacks: object) -> httptools.HttpRequestParser:
    """A parser with uvicorn's options: bytes behind the last request of a connection are not an error."""
    made = httptools.HttpRequestParser(callbacks)
    made.set_dangerous_leniencies(lenient_data_after_close=True)
    return made


def successor(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    """The parser to be fed `head()`, then all that follows the head with the offer."""
    return parser(_Callbacks(protocol))


def head(method: bytes, headers: Iterable[tuple[bytes, bytes]], *, keep_alive: bool) -> bytes:
    """A head that frames the body as these headers do (lower-case names), without the offer."""
    lines = [b"%b / HTTP/1.1" % method]
    lines += [b"%b: %b" % (name, value) for name, value in headers if name in _FRAMING]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"", b""])


class _Callbacks:
    """The protocol's, but not for the first head. The message may end with that, so its end is always passed on."""

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self._is_first = True
        self._protocol = protocol
        self.on_message_begin = self._unless_first(protocol.on_message_begin)
        self.on_url = self._unless_first(protocol.on_url)
        self.on_header = self._unless_first(protocol.on_header)
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_headers_complete(self) -> None:
        if not self._is_first:
            self._protocol.on_headers_complete()
        self._is_first = False

    def _unless_first(self, callback: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: None if self._is_first else callback(*args)
