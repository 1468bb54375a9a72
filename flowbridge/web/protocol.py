"""One connection of a caller: HTTP/1.1 with deadlines and bounds that uvicorn's own protocol does not have."""

import asyncio
import json
from asyncio import TimerHandle, Transport
from dataclasses import dataclass
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from flowbridge.errors import Errcode
from flowbridge.web import answering, pipelining, upgrade
from flowbridge.web.connections import Connections
from flowbridge.web.endpoint import ANSWER, HANG_UP

HEAD_SECONDS = 10.0  # for a request line and its headers to arrive
BODY_SECONDS = 20.0  # for a body, or for each further part of it:
BODY_PART_BYTES = 64 * 1024  # so much must come in that time while somebody reads it, which lets an upload take hours
MAX_HEAD_BYTES = 64 * 1024


@dataclass(slots=True)
class Doors:
    """The ports, and the connections at each. `operations_port`: where only the operator asks, if there is one."""

    callers: Connections
    operations: Connections
    keep_alive: tuple[bytes, bytes]
    operations_port: int | None = None

    def at(self, port: int | None) -> Connections:
        return self.callers if port is None or port != self.operations_port else self.operations


class Protocol(HttpToolsProtocol):
    """uvicorn's own, with deadlines for the head and the body of a request, a size, and a number of connections.

    A request is read when those before it on its connection have been answered, so that `cycle` is the only one at
    work, and uvicorn's `pipeline` is not used.
    """

    flow: pipelining.Flow
    _connections: Connections
    _timer: TimerHandle | None = None
    _head_bytes = 0
    _body_bytes = 0  # since the timer was set
    _loose_bytes = 0  # since the last byte of a body: chunk extensions and trailers
    _left = 0  # bytes of a body that are still to come, if it said how many
    _in_head = True
    _has_come = False  # a request, whole, that has not been answered
    _ended_late = False  # the body has come of a request that had been answered before
    _is_connect = False
    _is_deaf = False  # nothing that still comes is read
    _behind = b""  # what came behind the request at work: read from `_behind_at` when that has been answered
    _behind_at = 0

    def __init__(self, doors: Doors, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._doors = doors

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = pipelining.Flow(transport)
        self._connections = self._doors.at(self.server[1] if self.server else None)
        file = transport.get_extra_info("socket").fileno()
        if refusal := self._connections.admit(self, self.client[0] if self.client else "", file):
            self._refuse(503, Errcode.LIMIT_EXCEEDED, refusal)
        else:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()  # uvicorn leaves it after a reset, and with it all of this for 75 s
        self._connections.drop(self)
        self._behind = b""
        super().connection_lost(exc)

    def make_room(self) -> None:
        """Close an idle connection: another one needs its place. One that does not take its answer would not close."""
        self._stop_timer()
        self._is_deaf = True
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        self._connections.wake(self)
        self._read(data, 0)

    def _read(self, data: bytes, at: int) -> None:
        """Give the bytes from `at` to the parser, each once and as it came, until a request has come whole."""
        size, began = len(data), at
        while at < size and not self._has_come:
            end = min(size, at + self._left) if self._left else pipelining.end_of_piece(data, at)
            self._loose_bytes += end - at
            used = end - at
            try:
                try:
                    self.parser.feed_data(data[at:end] if used < size else data)
                except httptools.HttpParserUpgrade as stop:
                    used = stop.args[0]
                    self._pass_over_offer()
            except httptools.HttpParserError:
                self._refuse(400, Errcode.UNKNOWN, "this is not an HTTP/1.1 request")
                return
            if self._is_connect:
                self._refuse(400, Errcode.UNRECOGNIZED, "CONNECT is for proxies, and flowbridge is not one")
                return
            if self._in_head:
                self._head_bytes += used
            at += used
        if self._has_come:
            self._stop_timer()
            if at < size and self.cycle.keep_alive:  # else its answer ends the connection
                self._keep(data, at)
        elif self._in_head:
            self._time_the_head()
        else:
            self._time_the_body(at - began)

    def _pass_over_offer(self) -> None:
        """The parser stops behind an offer to upgrade, which is not taken: another one reads on."""
        if not self._is_connect:
            self.parser = upgrade.successor(self)
            kept = self.cycle.keep_alive
            self.parser.feed_data(upgrade.head(self.scope["method"].encode(), self.headers, keep_alive=kept))

    def _keep(self, data: bytes, at: int) -> None:
        """What is behind a request that has come whole. Reading goes on, or nobody would see the caller hang up."""
        if self._behind:
            self._behind, self._behind_at = self._behind[self._behind_at :] + data[at:], 0
        else:
            self._behind, self._behind_at = data, at
        if len(self._behind) - self._behind_at > pipelining.MAX_BEHIND:
            self.flow.is_full = True
            self.flow.pause_reading()
            self._timer = self.loop.call_later(pipelining.LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Nothing is read: look whether the caller is still there."""
        if pipelining.has_hung_up(self.transport.get_extra_info("socket").fileno()):
            self._timer = None
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(pipelining.LOOK_SECONDS, self._look)

    def _time_the_head(self) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, Errcode.TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _time_the_body(self, more: int) -> None:
        self._body_bytes += more
        if self._ended_late:
            self._ended_late = False
            self._stop_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            self._connections.rest(self)
        elif self.cycle.response_complete:  # bytes behind an answer: uvicorn has stopped its own clock for them
            if self._timer is None:
                self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self._loose_bytes > MAX_HEAD_BYTES:
            self._refuse(431, Errcode.TOO_LARGE, f"the trailers are longer than {MAX_HEAD_BYTES} bytes")
        elif self._timer is None:
            self._expect_a_part()

    def _expect_a_part(self) -> None:
        self._body_bytes = 0
        self._timer = self.loop.call_later(BODY_SECONDS, self._too_slow)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes, self._left, self._ended_late = True, 0, 0, False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """uvicorn's own, without blanks at the end of the value (RFC 9110 §5.5), and without trailers.

        llhttp strips only those at its beginning. A trailer is not a header (§6.5.1): a proxy in front checks headers.
        """
        if self._in_head:
            name, value = name.lower(), value.rstrip(b" \t")
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = self.parser.get_http_version() != "1.0"  # RFC 9110 §10.1.1
            elif name == b"content-length":
                self._left = int(value)
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """In place of uvicorn's, which decodes the path, too, and queues what comes behind a request at work."""
        parser, scope = self.parser, self.scope
        method = parser.get_method()
        if parser.should_upgrade() and method == b"CONNECT":
            self._is_connect = True
            return
        # No request has a fragment (RFC 9112): this is a room alias.
        url = httptools.parse_url(self.url.replace(b"#", b"%23"))
        version = parser.get_http_version()
        is_kept = version != "1.0" and parser.should_keep_alive()
        scope["method"] = method.decode("ascii")
        scope["http_version"] = version
        scope["raw_path"] = url.path
        scope["path"] = url.path.decode("ascii")  # nothing looks at it: `%2F` inside a segment must survive
        scope["query_string"] = url.query or b""
        headers = self.server_state.default_headers
        self.cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=[*headers, self._doors.keep_alive] if is_kept else headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=is_kept,
            on_response=self.on_response_complete,
        )
        scope[ANSWER] = partial(answering.answer, self.cycle)  # type: ignore[literal-required]
        scope[HANG_UP] = partial(self._hang_up, self.cycle)  # type: ignore[literal-required]
        self._in_head = False
        self._loose_bytes = 0
        self._stop_timer()
        self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        if self._left:
            self._left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # its body is still to come
        self._ended_late = self.cycle.response_complete
        self._has_come = not self._ended_late
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._has_come = self.flow.is_full = False
        super().on_response_complete()
        if self._behind and not self.transport.is_closing():
            behind, self._behind = self._behind, b""
            self._unset_keepalive_if_required()
            self._stop_timer()
            self._read(behind, self._behind_at)
        elif not self._in_head:
            self._connections.rest(self)

    def shutdown(self) -> None:
        """A request at work is answered, and what is behind it is not: the answer says so."""
        super().shutdown()
        if self.cycle is not None:
            self._end_after(self.cycle)

    def _end_after(self, cycle: RequestResponseCycle) -> None:
        """Close the connection behind this answer, which no longer says that it is kept."""
        cycle.keep_alive = False
        cycle.default_headers = [pair for pair in cycle.default_headers if pair is not self._doors.keep_alive]

    def _hang_up(self, cycle: RequestResponseCycle) -> None:
        """End the connection in the middle of an answer: what is missing is seen to be missing."""
        cycle.disconnected = True  # uvicorn need not wonder why the answer has no end
        self.transport.abort()

    def _too_slow(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # it is we who do not read
            self._timer = self.loop.call_later(BODY_SECONDS, self._too_slow)
            return
        if not self._in_head and self.cycle.response_complete:
            self.transport.close()  # answered before its body had come: the rest is read by no handler
            return
        if not self._in_head and self._body_bytes >= BODY_PART_BYTES:
            self._expect_a_part()
            return
        what, seconds = ("headers", HEAD_SECONDS) if self._in_head else ("body", BODY_SECONDS)
        self._refuse(408, Errcode.UNKNOWN, f"the {what} did not arrive within {seconds:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, errcode: Errcode, error: str) -> None:
        """Read nothing more, answer by hand, since no request came to be, and hang up.

        Requests before it have been answered. Any web page may read this answer, whatever was asked.
        """
        self._stop_timer()
        self._is_deaf = True
        if self.transport.is_closing():
            return
        if not self._in_head and self.cycle.response_complete:
            self.transport.close()  # in the body of a request that has its answer: one more would be taken for the next
            return
        if not self._in_head and self.cycle.response_started:
            self._hang_up(self.cycle)  # nothing else can be said in the middle of an answer
            return
        body = json.dumps({"errcode": errcode, "error": error}).encode()
        again = b"retry-after: 2\r\n" if status == 503 else b""
        self.transport.write(
            b"%bcontent-type: application/json\r\naccess-control-allow-origin: *\r\ncontent-length: %d\r\n"
            b"%bconnection: close\r\n\r\n%b" % (STATUS_LINE[status], len(body), again, body)
        )
        self.transport.close()
