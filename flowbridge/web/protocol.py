"""One caller's connection: HTTP/1.1 with the deadlines and bounds that uvicorn's own protocol lacks."""

import asyncio
import json
from asyncio import TimerHandle, Transport
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from flowbridge.errors import Errcode
from flowbridge.limits.deadlines import Deadlines
from flowbridge.models.timing import Timing
from flowbridge.web import answering, not_http, pipelining, upgrade
from flowbridge.web.connections import Connections
from flowbridge.web.endpoint import ANSWER, HANG_UP, RECEIPT, STARTED, Headers
from flowbridge.web.usual import UNUSUAL, Takes, Usual

MIN_BODY_BYTES = 64 * 1024  # that must arrive in each `body_seconds`, so that an upload may take hours
MAX_HEAD_BYTES = 64 * 1024


@dataclass(slots=True)
class Ports:
    """What all connections of a server share. `operations_port`: the operator's own port, if it is apart.

    `usual`: answer most requests of callers; without any, all take the ordinary way.
    """

    callers: Connections
    operations: Connections
    timing: Timing
    usual: Sequence[Takes] = ()
    operations_port: int | None = None
    hellos: not_http.Hellos = field(default_factory=not_http.Hellos)
    kept_alive: "Deadlines[Protocol]" = field(init=False)  # idle connections

    def __post_init__(self) -> None:
        self.kept_alive = Deadlines(self.timing.keep_alive_seconds, Protocol.timeout_keep_alive_handler)

    def connections_at(self, port: int | None) -> Connections:
        return self.callers if port is None or port != self.operations_port else self.operations


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with deadlines for a request's head and body, a bound on its head, and one on connections.

    A request is read once those before it on its connection have been answered. So `cycle` is the only one in flight,
    and uvicorn's `pipeline` stays empty. It begins when what has arrived was read: with its head, often with all of it.
    """

    flow: pipelining.Flow
    _connections: Connections
    _timer: TimerHandle | None = None
    _head_bytes = 0
    _body_bytes = 0  # since the timer was set
    _overhead_bytes = 0  # since the last byte of a body: chunk extensions and trailers
    _body_left = 0  # bytes of a body with a Content-Length that have not arrived
    _in_head = True
    _has_begun = False  # the request whose head has arrived
    _version = ""
    method = ""
    raw_path = query = b""
    is_kept = False  # the connection, after this request
    _is_complete = False  # the request in flight has arrived, and is not answered
    _ended_late = False  # the body arrived after its request had been answered
    _is_connect = False
    _discards = False  # whatever still arrives is not read
    _behind = b""  # what arrived behind the request in flight: read from `_behind_at` once that is answered
    _behind_at = 0

    def __init__(self, ports: Ports, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._ports = ports
        self._timing = ports.timing
        self._parts: list[bytes] = []  # of the body of a request that has not begun
        self._kept_header = (b"keep-alive", b"timeout=%d" % ports.timing.keep_alive_seconds)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = pipelining.Flow(transport)
        self._connections = self._ports.connections_at(self.server[1] if self.server else None)
        file = transport.get_extra_info("socket").fileno()
        if refusal := self._connections.admit(self, self.client[0] if self.client else "", file):
            self._refuse(503, Errcode.LIMIT_EXCEEDED, refusal)
        else:
            self._timer = self.loop.call_later(self._timing.head_seconds, self._time_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()  # after a reset uvicorn leaves it, which keeps this object alive for 75 s
        self._connections.remove(self)
        self._behind = b""
        super().connection_lost(exc)

    def evict(self) -> None:
        """Close this idle connection for a new one. With an answer that the caller does not take, it has to abort."""
        self._stop_timer()
        self._discards = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._discards:
            return
        self._unset_keepalive_if_required()
        self._connections.mark_busy(self)
        self._read(data, 0)

    def _read(self, data: bytes, at: int) -> None:
        """Feed the parser the bytes from `at`, each once and unchanged, until a request is complete."""
        size, began = len(data), at
        while at < size and not self._is_complete:
            end = min(size, at + self._body_left) if self._body_left else pipelining.end_of_piece(data, at)
            self._overhead_bytes += end - at
            used = end - at
            try:
                try:
                    self.parser.feed_data(data[at:end] if used < size else data)
                except httptools.HttpParserUpgrade as stop:
                    used = stop.args[0]
                    self._ignore_upgrade()
            except httptools.HttpParserError:
                if not (self._in_head or self._has_begun):
                    self._begin()
                self._refuse(400, Errcode.UNKNOWN, self._complaint(data[at:end]))
                return
            if self._is_connect:
                self._refuse(400, Errcode.UNRECOGNIZED, "CONNECT is for proxies, and flowbridge is not one")
                return
            if self._in_head:
                self._head_bytes += used
            at += used
        if not (self._in_head or self._has_begun):
            self._begin()
        if self._is_complete:
            self._stop_timer()
            if at < size and self.cycle.keep_alive:  # else its answer ends the connection
                self._keep(data, at)
        elif self._in_head:
            self._time_the_head()
        else:
            self._time_the_body(at - began)

    def _complaint(self, data: bytes) -> str:
        """What is wrong with bytes that the parser did not take."""
        begins = self._in_head and not self._head_bytes
        if begins and not_http.is_tls(data):
            self._ports.hellos.note(self.client[0] if self.client else "")
        return not_http.reason(data if begins else b"")

    def _ignore_upgrade(self) -> None:
        """The parser stops behind an offer to upgrade, which is declined: another one reads on."""
        if not self._is_connect:
            self.parser = upgrade.successor(self)
            self.parser.feed_data(upgrade.head(self.method.encode(), self.headers, keep_alive=self.is_kept))

    def _keep(self, data: bytes, at: int) -> None:
        """Keep what is behind a complete request. Reading goes on, since a hang-up would go unnoticed otherwise."""
        if self._behind:
            self._behind, self._behind_at = self._behind[self._behind_at :] + data[at:], 0
        else:
            self._behind, self._behind_at = data, at
        if len(self._behind) - self._behind_at > pipelining.MAX_BEHIND:
            self.flow.is_full = True
            self.flow.pause_reading()
            self._timer = self.loop.call_later(self._timing.hang_up_poll_seconds, self._poll_hang_up)

    def _poll_hang_up(self) -> None:
        """Check whether the caller is still there, while nothing is read."""
        if pipelining.has_hung_up(self.transport.get_extra_info("socket").fileno()):
            self._timer = None
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(self._timing.hang_up_poll_seconds, self._poll_hang_up)

    def _time_the_head(self) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, Errcode.TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        elif self._timer is None:
            self._timer = self.loop.call_later(self._timing.head_seconds, self._time_out)

    def _time_the_body(self, more: int) -> None:
        self._body_bytes += more
        if self._ended_late:
            self._ended_late = False
            self._stop_timer()
            self._ports.kept_alive.set(self)
            self._connections.mark_idle(self)
        elif self.cycle.response_complete:  # bytes behind an answer: they have stopped uvicorn's own timer
            if self._timer is None:
                self._timer = self.loop.call_later(self._timing.head_seconds, self.transport.close)
        elif self._overhead_bytes > MAX_HEAD_BYTES:
            self._refuse(431, Errcode.TOO_LARGE, f"the trailers are longer than {MAX_HEAD_BYTES} bytes")
        elif self._timer is None:
            self._time_a_part()

    def _time_a_part(self) -> None:
        self._body_bytes = 0
        self._timer = self.loop.call_later(self._timing.body_seconds, self._time_out)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes, self._body_left, self._ended_late = True, 0, 0, False
        self._has_begun = False
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header, without the blanks at its end (RFC 9110 §5.5), which llhttp leaves; ignore a trailer.

        A trailer is not a header (§6.5.1): a proxy in front checks only headers.
        """
        if self._in_head:
            name, value = name.lower(), value.rstrip(b" \t")
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = self.parser.get_http_version() != "1.0"  # RFC 9110 §10.1.1
            elif name == b"content-length":
                self._body_left = int(value)
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self.parser
        method = parser.get_method()
        if parser.should_upgrade() and method == b"CONNECT":
            self._is_connect = True
            return
        # No request has a fragment (RFC 9112): this is a room alias.
        url = httptools.parse_url(self.url.replace(b"#", b"%23"))
        if not url.path or not url.path.isascii():
            raise ValueError("an address without a path that can be read")  # the parser passes it on as its own error
        self.raw_path, self.query = url.path, url.query or b""
        self.method = method.decode("ascii")
        self._version = parser.get_http_version()
        self.is_kept = self._version != "1.0" and parser.should_keep_alive()
        self._in_head = False
        self._overhead_bytes = 0
        self._stop_timer()

    def _begin(self) -> None:
        """Start the request: all of it has arrived, or at least its head."""
        if self._is_complete and self._connections is self._ports.callers and not self.flow.write_paused:
            headers = self._plain_headers()
            for takes in self._ports.usual:
                if headers is not None and (usual := takes.take(self, headers)) is not None:
                    self._has_begun = True
                    self._parts.clear()
                    self.cycle = usual  # type: ignore[assignment]  # all that is used of a cycle here
                    return
        self._begin_asgi()

    def _plain_headers(self) -> dict[bytes, bytes] | None:
        """The headers of the request, if neither they nor its query make it unusual."""
        if self.query or self.method not in ("POST", "PUT"):
            return None
        headers = dict(self.headers)
        return headers if len(headers) == len(self.headers) and UNUSUAL.isdisjoint(headers) else None

    def go_on(self, usual: Usual) -> None:
        """Let the application answer a usual request: what has begun, or the whole of it if nothing has."""
        self._begin_asgi(usual)

    def body(self) -> bytes:
        """Of the request that has arrived and not begun."""
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def default_headers(self) -> Headers:
        """Of the answer to the request that has arrived."""
        headers = self.server_state.default_headers
        return [*headers, self._kept_header] if self.is_kept else headers

    def _begin_asgi(self, usual: Usual | None = None) -> None:
        """uvicorn's own way also decodes the path, and queues what arrives behind a request."""
        self._has_begun = True
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": self._version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
            "method": self.method,
            "raw_path": self.raw_path,
            "path": self.raw_path.decode("ascii"),  # never decoded: `%2F` inside a segment must survive
            "query_string": self.query,
        }
        cycle = self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.default_headers() if usual is None else usual.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self.is_kept if usual is None else usual.keep_alive,
            on_response=self.on_response_complete,
        )
        self.scope[ANSWER] = partial(answering.answer, cycle)  # type: ignore[literal-required]
        self.scope[HANG_UP] = partial(self._hang_up, cycle)  # type: ignore[literal-required]
        if usual is not None:
            self.scope[STARTED] = usual.started  # type: ignore[literal-required]
            cycle.disconnected = usual.disconnected
            if usual.is_begun:
                self.scope[RECEIPT] = usual  # type: ignore[literal-required]
            else:
                self._parts = [usual.body]
        self._start_asgi_task(cycle, self.app)
        parts, self._parts = self._parts, []
        for part in parts:
            super().on_body(part)
        if self._is_complete:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes = 0
        if self._body_left:
            self._body_left -= len(body)
        if self._has_begun:
            super().on_body(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the body is still to come
        self._ended_late = self._has_begun and self.cycle.response_complete
        self._is_complete = not self._ended_late
        if self._has_begun:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self._is_complete = self.flow.is_full = False
        self.server_state.total_requests += 1
        is_closing = self.transport.is_closing()
        if not is_closing:
            self.flow.resume_reading()
        if self._behind and not is_closing:
            behind, self._behind = self._behind, b""
            self._stop_timer()
            self._read(behind, self._behind_at)
            return
        if not is_closing:
            self._ports.kept_alive.set(self)
        if not self._in_head:
            self._connections.mark_idle(self)

    def _unset_keepalive_if_required(self) -> None:
        self._ports.kept_alive.drop(self)

    def shutdown(self) -> None:
        """Answer the request in flight, and nothing behind it: the answer says so."""
        super().shutdown()
        if self.cycle is not None:
            self._end_after(self.cycle)

    def _end_after(self, cycle: RequestResponseCycle) -> None:
        """Close the connection after this answer, which no longer says that it is kept."""
        cycle.keep_alive = False
        cycle.default_headers = [pair for pair in cycle.default_headers if pair is not self._kept_header]

    def _hang_up(self, cycle: RequestResponseCycle) -> None:
        """Abort the connection in the middle of an answer, so that the caller knows that it is incomplete."""
        cycle.disconnected = True  # else uvicorn logs that the answer has no end
        self.transport.abort()

    def _time_out(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # the delay is ours
            self._timer = self.loop.call_later(self._timing.body_seconds, self._time_out)
        elif self._in_head:
            self._refuse(408, Errcode.UNKNOWN, f"the headers did not arrive within {self._timing.head_seconds:g} s")
        elif self.cycle.response_complete:
            self.transport.close()  # answered before its body arrived: no handler reads the rest
        elif self._body_bytes >= MIN_BODY_BYTES:
            self._time_a_part()
        else:
            self._refuse(408, Errcode.UNKNOWN, f"the body did not arrive within {self._timing.body_seconds:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, errcode: Errcode, error: str) -> None:
        """Read no more, answer without an ASGI request, since there is none, and hang up.

        Requests before it have been answered. Any web page may read this answer.
        """
        self._stop_timer()
        self._discards = True
        if self.transport.is_closing():
            return
        if not self._in_head and self.cycle.response_started:
            if self.cycle.response_complete:  # a second answer would be taken for that to the next request
                self.transport.close()
            else:
                self._hang_up(self.cycle)
            return
        body = json.dumps({"errcode": errcode, "error": error}).encode()
        again = b"retry-after: 2\r\n" if status == 503 else b""
        self.transport.write(
            b"%bcontent-type: application/json\r\naccess-control-allow-origin: *\r\ncontent-length: %d\r\n"
            b"%bconnection: close\r\n\r\n%b" % (STATUS_LINE[status], len(body), again, body)
        )
        self.transport.close()
