"""What usual requests have in common, which are answered without ASGI: sends and requests to hooks.

One that has arrived in one piece, and whose headers say nothing of how it is to be read or answered. It stands in the
place of uvicorn's cycle until its answer. Whatever turns out to be unusual goes on in the ordinary way
(`Connection.go_on`).
"""

from collections.abc import Mapping
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl

from flowbridge.limits.proxies import Proxies
from flowbridge.web.endpoint import Headers

# What the ordinary way has to see: another form of the body, a page that wants to read the answer.
UNUSUAL = frozenset({b"content-encoding", b"expect", b"upgrade", b"origin"})


class Connection(Protocol):
    """What a usual request has to know of web/protocol.py: what has arrived, and how to answer it."""

    transport: Any
    client: tuple[str, int] | None
    headers: Headers
    method: str
    raw_path: bytes
    query: bytes
    is_kept: bool

    @property
    def flow(self) -> FlowControl: ...
    def body(self) -> bytes: ...
    def default_headers(self) -> Headers: ...
    def on_response_complete(self) -> None: ...
    def go_on(self, usual: "Usual") -> None: ...


class _Silent:
    """No task waits for what arrives behind a usual request, nor for its hang-up."""

    def set(self) -> None: ...


class Usual:
    """Has the attributes of uvicorn's cycle. `is_begun`: the ordinary way does not begin again, but answers it."""

    message_event = _Silent()
    is_begun = False
    error: Exception | None = None  # why it was refused

    def __init__(
        self, connection: Connection, started: float, headers: Mapping[bytes, bytes], proxies: Proxies | None
    ) -> None:
        self._connection = connection
        self.started = started
        self.client = client_of(connection, headers, proxies)
        self.scope = {"method": connection.method}
        self.transport = connection.transport
        self.flow = connection.flow
        self.keep_alive = connection.is_kept
        self.default_headers = connection.default_headers()
        self.on_response = connection.on_response_complete
        self.disconnected = self.response_started = self.response_complete = self.waiting_for_100_continue = False

    @property
    def body(self) -> bytes:
        raise NotImplementedError


class Takes(Protocol):
    def take(self, connection: Connection, headers: dict[bytes, bytes]) -> Usual | None:
        """Begin with the request that has arrived on a connection. None, and nothing has happened: it is not usual.

        `headers`: its own, none of which makes it unusual; nor does its query.
        """


def client_of(connection: Connection, headers: Mapping[bytes, bytes], proxies: Proxies | None) -> str | None:
    """The address that the request came from, behind proxies that are trusted."""
    client = connection.client[0] if connection.client else None
    if proxies is not None and client is not None:
        forwarded = headers.get(b"x-forwarded-for")
        client = proxies.client(client, () if forwarded is None else (forwarded,))
    return client
