"""A short answer in one write: the same bytes as uvicorn's own two, or none at all."""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from flowbridge.web.answering import answer

BODY = b'{"event_id":"$1"}'
HEADERS = [(b"content-length", b"17"), (b"content-type", b"application/json")]


@dataclass
class Transport:
    written: list[bytes] = field(default_factory=list)
    closed: int = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed += 1


def cycle_on(transport: Transport, *, method: str = "POST", keep_alive: bool = True) -> RequestResponseCycle:
    kept = [(b"keep-alive", b"timeout=75")] if keep_alive else []
    made = RequestResponseCycle(
        scope=cast("Any", {"type": "http", "method": method}),
        transport=cast("Any", transport),
        flow=FlowControl(cast("Any", transport)),
        logger=logging.getLogger(),
        access_logger=logging.getLogger(),
        access_log=False,
        default_headers=[(b"date", b"Mon, 30 Nov 2026 00:00:00 GMT"), *kept],
        message_event=asyncio.Event(),
        expect_100_continue=True,
        keep_alive=keep_alive,
        on_response=lambda: transport.written.append(b"<over>"),
    )
    made.body += b"what has come of the request"
    return made


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("status", [200, 202, 400, 429, 503, 507])
async def test_what_is_written_is_what_uvicorn_writes(status: int, keep_alive: bool) -> None:
    ours, theirs = Transport(), Transport()
    at_once, usual = cycle_on(ours, keep_alive=keep_alive), cycle_on(theirs, keep_alive=keep_alive)
    headers = [*HEADERS, (b"retry-after", b"2")]
    assert answer(at_once, status, headers, BODY)
    await usual.send({"type": "http.response.start", "status": status, "headers": headers})
    await usual.send({"type": "http.response.body", "body": BODY})
    head, body, over = theirs.written
    assert ours.written == [head + body, over]
    assert ours.closed == theirs.closed == (not keep_alive)
    assert await at_once.receive() == await usual.receive() == {"type": "http.disconnect"}
    with pytest.raises(RuntimeError, match="already completed"):
        await at_once.send({"type": "http.response.body", "body": b"more"})


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb", b"\x00", b"\x7f"])
async def test_a_value_that_could_end_its_line_is_never_written(value: bytes) -> None:
    transport = Transport()
    assert not answer(cycle_on(transport), 200, [*HEADERS, (b"location", value)], BODY)
    assert transport.written == []


async def test_head_gets_no_body() -> None:
    transport = Transport()
    assert not answer(cycle_on(transport, method="HEAD"), 200, HEADERS, BODY)
    assert transport.written == []


@pytest.mark.parametrize("state", ["response_started", "disconnected"])
async def test_nothing_is_written_behind_an_answer_or_to_one_who_has_gone(state: str) -> None:
    transport = Transport()
    cycle = cycle_on(transport)
    setattr(cycle, state, True)
    assert not answer(cycle, 200, HEADERS, BODY)
    assert transport.written == []


async def test_a_caller_who_does_not_read_is_waited_for() -> None:
    transport = Transport()
    cycle = cycle_on(transport)
    cycle.flow.pause_writing()
    assert not answer(cycle, 200, HEADERS, BODY)
    assert transport.written == []
