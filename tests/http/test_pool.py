"""A pool of connections in front of a homeserver that misbehaves in every way that one connection allows."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowbridge.homeserver import Locator, tls_context
from flowbridge.homeserver.connection import NoAnswer, TimedOut, Unreachable
from flowbridge.homeserver.pool import Answer, Pool
from flowbridge.models.timing import Timing
from tests import upstream as scripted
from tests.http.conftest import Authority
from tests.upstream import PATIENCE, Behaviour, Connection, Request, Upstream

LIMIT = 64 * 1024
TARGET = "/_matrix/client/v3/rooms/r/send/t/1"
OK = scripted.answer({"event_id": "$1"})
TLS = ssl.create_default_context()
SHORT = 0.3  # a deadline that is meant to pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(lambda _: OK) as server:
        yield server


@pytest.fixture
async def pool(upstream: Upstream) -> AsyncIterator[Pool]:
    made = pool_to(upstream.port)
    yield made
    made.close()


@pytest.fixture
async def single(upstream: Upstream) -> AsyncIterator[Pool]:
    """A pool of one connection."""
    made = pool_to(upstream.port, most=1)
    yield made
    made.close()


def pool_to(port: int, most: int = 128, **more: Any) -> Pool:
    return Pool(Locator(f"http://127.0.0.1:{port}", TLS), TLS, most=most, **more)


async def ask(pool: Pool, method: str = "PUT", *, deadline: float = PATIENCE, limit: int = LIMIT) -> Answer:
    return await pool.exchange(method, TARGET, b"X-Test: 1\r\n", b'{"a":1}', deadline=deadline, limit=limit)


async def until(happened: Callable[[], object]) -> object:
    """Wait in a thread for something that the upstream sees."""
    return await asyncio.to_thread(happened)


async def fails(asking: Awaitable[Answer], kind: type[NoAnswer], text: str) -> NoAnswer:
    with pytest.raises(kind, match=text) as failure:
        await asking
    assert type(failure.value) in (kind, *kind.__subclasses__())
    return failure.value


def first_on_each_connection(first: Behaviour, later: Behaviour) -> scripted.Script:
    """`first` for the first request of every connection, `later` for those behind it."""
    seen: set[int] = set()

    def script(request: Request) -> Behaviour:
        if request.connection in seen:
            return later
        seen.add(request.connection)
        return first

    return script


async def test_request_arrives_as_it_was_asked(upstream: Upstream, pool: Pool) -> None:
    answer = await ask(pool)
    (request,) = upstream.requests
    assert (request.method, request.target, request.body) == ("PUT", TARGET, b'{"a":1}')
    assert request.headers == (("host", f"127.0.0.1:{upstream.port}"), ("content-length", "7"), ("x-test", "1"))
    assert (answer.status, answer.body) == (200, b'{"event_id": "$1"}')
    assert answer.header(b"content-type") == "application/json"
    assert answer.header(b"retry-after") == ""


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_ten_calls_in_a_row_use_one_connection(upstream: Upstream, pool: Pool, method: str) -> None:
    for _ in range(10):
        await ask(pool, method)
    assert len(upstream.requests) == 10
    assert upstream.accepted == 1


async def test_a_later_question_on_a_connection_may_end_sooner(upstream: Upstream, pool: Pool) -> None:
    await ask(pool, deadline=PATIENCE)
    upstream.always(scripted.silence)
    started = time.monotonic()
    await fails(ask(pool, deadline=SHORT), TimedOut, "did not answer in time")
    assert time.monotonic() - started < PATIENCE / 2
    assert upstream.accepted == 1


async def test_the_deadline_of_a_question_ends_none_that_comes_after_it(upstream: Upstream, pool: Pool) -> None:
    while True:
        try:
            await ask(pool, deadline=SHORT)
            break
        except TimedOut:  # a busy machine
            continue
    connections, passed = upstream.accepted, threading.Event()
    upstream.always(scripted.when(passed, OK))
    asking = asyncio.ensure_future(ask(pool, deadline=PATIENCE))
    await asyncio.sleep(2 * SHORT)
    assert not asking.done()
    passed.set()
    assert (await asking).status == 200
    upstream.always(scripted.silence)
    await fails(ask(pool, deadline=SHORT), TimedOut, "did not answer in time")
    assert upstream.accepted == connections


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_kept_connection_that_ends_without_a_byte_is_replaced_once(
    upstream: Upstream, pool: Pool, method: str
) -> None:
    upstream.script(first_on_each_connection(OK, scripted.hang_up))
    await ask(pool, method)
    answer = await ask(pool, method)
    assert answer.status == 200
    assert [request.connection for request in upstream.requests] == [1, 1, 2]


async def test_replaced_connection_that_ends_too_is_not_replaced_again(upstream: Upstream, pool: Pool) -> None:
    await ask(pool)
    upstream.always(scripted.hang_up)
    failure = await fails(ask(pool), Unreachable, "closed the connection without an answer")
    assert failure.sent
    assert [request.connection for request in upstream.requests] == [1, 1, 2]


async def test_request_that_a_kept_connection_took_along_counts_as_sent_when_there_is_no_new_one(
    upstream: Upstream, pool: Pool
) -> None:
    """The homeserver may have read it: to say that it was not sent would double the event under another token."""
    await ask(pool)

    def leave(connection: scripted.Connection) -> None:
        upstream.refuse()
        connection.close()

    upstream.always(leave)
    failure = await fails(ask(pool, "PUT"), Unreachable, "cannot connect")
    assert failure.sent
    assert len(upstream.requests) == 2


async def test_new_connection_that_ends_without_an_answer_is_not_replaced(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.hang_up)
    failure = await fails(ask(pool), Unreachable, "closed the connection without an answer")
    assert failure.sent
    assert len(upstream.requests) == 1


async def test_kept_connection_that_ends_in_the_middle_of_an_answer_is_not_replaced(
    upstream: Upstream, pool: Pool
) -> None:
    broken = scripted.then_close(scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"))
    upstream.script(first_on_each_connection(OK, broken))
    await ask(pool)
    failure = await fails(ask(pool), Unreachable, "closed the connection")
    assert failure.sent
    assert len(upstream.requests) == 2


async def test_post_never_goes_twice(upstream: Upstream, pool: Pool) -> None:
    await ask(pool, "POST")
    upstream.script(first_on_each_connection(scripted.hang_up, scripted.hang_up))
    failure = await fails(ask(pool, "POST"), Unreachable, "closed the connection")
    assert failure.sent
    assert len(upstream.requests) == 2


async def test_post_does_not_use_a_kept_connection(upstream: Upstream, pool: Pool) -> None:
    await ask(pool, "PUT")
    await ask(pool, "POST")
    assert [request.connection for request in upstream.requests] == [1, 2]


async def test_homeserver_that_closes_after_each_answer_is_still_served(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.then_close(OK))
    for _ in range(20):
        assert (await ask(pool)).status == 200


async def test_connection_is_not_kept_when_the_homeserver_says_so(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.answer({}, 200, "Connection: close"))
    await ask(pool)
    await ask(pool)
    assert [request.connection for request in upstream.requests] == [1, 2]


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(scripted.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", 0.05), id="dripping"),
        pytest.param(scripted.silence, id="silent"),
    ],
)
async def test_deadline_ends_an_answer_that_does_not_come(upstream: Upstream, pool: Pool, behaviour: Behaviour) -> None:
    upstream.always(behaviour)
    started = time.monotonic()
    failure = await fails(ask(pool, deadline=SHORT), TimedOut, "did not answer in time")
    assert failure.sent
    assert SHORT * 0.9 <= time.monotonic() - started < PATIENCE
    await until(lambda: upstream.wait_for_open(0))


async def test_refused_connection_was_not_sent(upstream: Upstream, pool: Pool) -> None:
    upstream.refuse()
    failure = await fails(ask(pool), Unreachable, f"cannot connect to http://127.0.0.1:{upstream.port}: ")
    assert not failure.sent


async def test_connection_that_nobody_accepts_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as other:
        other.connect(listener.getsockname())  # the one place that the queue has
        pool = pool_to(listener.getsockname()[1], timing=Timing(connect_seconds=SHORT))
        failure = await fails(ask(pool), TimedOut, "does not accept a connection in time")
    assert not failure.sent


async def test_connection_that_ends_before_the_question_fails_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def slam() -> None:
            for _ in range(20):
                accepted, _ = listener.accept()
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
                accepted.close()

        slamming = asyncio.ensure_future(asyncio.to_thread(slam))
        pool = pool_to(listener.getsockname()[1])
        for _ in range(20):
            await fails(ask(pool), Unreachable, ".")  # and no TimedOut, after the deadline
        await slamming


async def test_megabyte_is_refused_where_the_limit_is_lower(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.raw(scripted.encoded(200, b"x" * 1_000_000)))
    await fails(ask(pool), Unreachable, f"larger than {LIMIT} bytes")
    await until(lambda: upstream.wait_for_open(0))


async def test_megabyte_is_read_where_the_limit_allows(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.raw(scripted.encoded(200, b"x" * 1_000_000)))
    assert len((await ask(pool, limit=1_000_000)).body) == 1_000_000


async def test_answer_one_byte_over_the_limit_is_refused(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.raw(scripted.encoded(200, b"x" * 101)))
    await fails(ask(pool, limit=100), Unreachable, "larger than 100 bytes")
    upstream.always(scripted.raw(scripted.encoded(200, b"x" * 100)))
    assert len((await ask(pool, limit=100)).body) == 100


async def test_flood_of_headers_is_cut_off(upstream: Upstream, pool: Pool) -> None:
    def flood(connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\n")
        while not connection.stopping.is_set():
            connection.send(b"X-Flood: 1\r\n" * 100)

    upstream.always(flood)
    await fails(ask(pool), Unreachable, "larger than")
    await until(lambda: upstream.wait_for_open(0))


async def test_flood_of_interim_answers_ends_with_the_deadline(upstream: Upstream, pool: Pool) -> None:
    def flood(connection: Connection) -> None:
        while not connection.stopping.wait(0.001):
            connection.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")

    upstream.always(flood)
    await fails(ask(pool, deadline=SHORT), NoAnswer, ".")
    await until(lambda: upstream.wait_for_open(0))


async def test_chunked_answer_is_put_together(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.chunked([b'{"event', b'_id":"$', b'1"}']))
    assert (await ask(pool)).body == b'{"event_id":"$1"}'
    await ask(pool)
    assert upstream.accepted == 1


async def test_chunked_answer_that_breaks_off_is_no_answer(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.chunked([b'{"event_id":"$1"}'], complete=False))
    await fails(ask(pool), Unreachable, "closed the connection")


async def test_answer_without_a_length_ends_with_its_connection(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.until_close(b'{"event_id":"$1"}'))
    assert (await ask(pool)).body == b'{"event_id":"$1"}'
    assert (await ask(pool)).body == b'{"event_id":"$1"}'
    assert upstream.accepted == 2


async def test_answer_that_comes_byte_by_byte_is_read(upstream: Upstream, pool: Pool) -> None:
    upstream.always(scripted.drip(scripted.encoded(200, b'{"event_id":"$1"}'), 0.001))
    assert (await ask(pool)).body == b'{"event_id":"$1"}'


@pytest.mark.parametrize("together", [True, False], ids=["in-one-piece", "in-two"])
async def test_interim_answers_are_not_the_answer(upstream: Upstream, pool: Pool, together: bool) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Type: text/html\r\n\r\n"
    final = scripted.encoded(200, b"{}", "Content-Type: application/json")

    def behave(connection: Connection) -> None:
        if together:
            connection.send(interim + final)
        else:
            connection.send(interim)
            connection.stopping.wait(0.05)
            connection.send(final)

    upstream.always(behave)
    for _ in range(2):
        answer = await ask(pool)
        assert (answer.status, answer.body) == (200, b"{}")
        assert answer.header(b"content-type") == "application/json"
    assert upstream.accepted == 1


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_that_has_no_body_needs_no_length(upstream: Upstream, pool: Pool, status: int) -> None:
    upstream.always(scripted.raw(b"HTTP/1.1 %d None\r\n\r\n" % status))
    assert (await ask(pool)).status == status
    assert (await ask(pool)).status == status


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="ssh"),
        pytest.param(b"\x15\x03\x01\x00\x02\x02F", id="tls-alert"),
        pytest.param(b"HTTP/1.1 abc\r\n\r\n", id="no-status"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", id="length-is-no-number"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", id="two-lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="chunk-is-no-number"),
        pytest.param(b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", id="upgrade"),
        pytest.param(b"\x00" * 100, id="zeros"),
    ],
)
async def test_what_is_not_http_is_no_answer(upstream: Upstream, pool: Pool, data: bytes) -> None:
    upstream.always(scripted.raw(data))
    failure = await fails(ask(pool), Unreachable, "is not HTTP/1.1")
    assert failure.sent
    await until(lambda: upstream.wait_for_open(0))


async def test_unasked_bytes_on_an_idle_connection_end_it(upstream: Upstream, pool: Pool) -> None:
    speak = threading.Event()

    def blurt(connection: Connection) -> None:
        OK(connection)
        assert speak.wait(PATIENCE)
        connection.send(scripted.encoded(200, b'{"event_id":"$forged"}'))

    upstream.always(blurt)
    await ask(pool)
    speak.set()
    await until(lambda: upstream.wait_for_open(0))
    upstream.always(OK)
    assert (await ask(pool)).body == b'{"event_id": "$1"}'
    assert [request.connection for request in upstream.requests] == [1, 2]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(scripted.encoded(200, b'{"event_id":"$forged"}'), id="a-whole-answer"),
        pytest.param(scripted.encoded(200, b'{"event_id":"$forged"}')[:-10], id="a-part-of-an-answer"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n", id="a-head"),
        pytest.param(b"HTTP", id="four-letters"),
        pytest.param(b"garbage", id="garbage"),
    ],
)
async def test_bytes_behind_an_answer_never_become_part_of_the_next(
    upstream: Upstream, pool: Pool, extra: bytes
) -> None:
    answer = scripted.encoded(200, b'{"event_id":"$mine"}')
    upstream.script(lambda request: scripted.raw(answer + extra) if request.connection == 1 else OK)
    assert (await ask(pool)).body == b'{"event_id":"$mine"}'
    assert (await ask(pool)).body == b'{"event_id": "$1"}'
    assert [request.connection for request in upstream.requests] == [1, 2]


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_no_more_connections_than_allowed_and_the_others_wait(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pool = pool_to(upstream.port, most=3)
    opened: list[int] = []  # how many there were when one was opened; the other side hears of an end later
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def counted(*args: Any, **kwargs: Any) -> Any:
        opened.append(len(pool))
        return await connect(*args, **kwargs)

    monkeypatch.setattr(loop, "create_connection", counted)
    go = threading.Event()
    upstream.always(scripted.when(go, OK))
    asking = [asyncio.create_task(ask(pool, method)) for _ in range(12)]
    await until(lambda: upstream.wait_for_requests(3))
    await fails(ask(pool, deadline=SHORT), TimedOut, "are taken")
    seen = len(upstream.requests)
    go.set()
    assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 12
    assert seen == 3
    assert len(upstream.requests) == 12
    assert max(opened) == 3
    pool.close()


async def test_who_waits_for_a_connection_waits_no_longer_than_the_deadline(upstream: Upstream, single: Pool) -> None:
    go = threading.Event()
    upstream.always(scripted.when(go, OK))
    first = asyncio.create_task(ask(single))
    await until(lambda: upstream.wait_for_requests(1))
    failure = await fails(ask(single, deadline=SHORT), TimedOut, "all 1 connections .* are taken")
    assert not failure.sent
    go.set()
    await first
    assert (await ask(single)).status == 200


async def test_who_waits_gets_the_place_of_a_connection_that_broke(upstream: Upstream, single: Pool) -> None:
    go = threading.Event()
    upstream.script(lambda request: scripted.when(go, scripted.hang_up) if request.connection == 1 else OK)
    first = asyncio.create_task(ask(single))
    await until(lambda: upstream.wait_for_requests(1))
    others = [asyncio.create_task(ask(single)) for _ in range(4)]
    await asyncio.sleep(0)
    go.set()
    await fails(first, Unreachable, "closed the connection")
    assert [answer.status for answer in await asyncio.gather(*others)] == [200] * 4


async def test_caller_who_goes_away_takes_the_connection_along_and_frees_its_place(
    upstream: Upstream, single: Pool
) -> None:
    upstream.script(lambda request: scripted.silence if request.connection == 1 else OK)
    first = asyncio.create_task(ask(single))
    await until(lambda: upstream.wait_for_requests(1))
    second = asyncio.create_task(ask(single))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).status == 200
    assert [request.connection for request in upstream.requests] == [1, 2]


async def test_place_is_not_lost_when_a_waiting_caller_goes_away(upstream: Upstream, single: Pool) -> None:
    go = threading.Event()
    upstream.always(scripted.when(go, OK))
    first = asyncio.create_task(ask(single))
    await until(lambda: upstream.wait_for_requests(1))
    waiting = asyncio.create_task(ask(single))
    await asyncio.sleep(0)
    waiting.cancel()
    go.set()
    await first
    assert (await ask(single)).status == 200
    assert len(upstream.requests) == 2


async def test_place_is_not_lost_when_a_caller_goes_away_in_the_moment_it_gets_one(
    upstream: Upstream, single: Pool
) -> None:
    go = threading.Event()
    upstream.always(scripted.when(go, OK))
    waiting: list[asyncio.Task[Answer]] = []

    async def first_then_cancel() -> None:
        await ask(single)
        waiting[0].cancel()  # it was given the connection just now, and has not yet run

    first = asyncio.create_task(first_then_cancel())
    await until(lambda: upstream.wait_for_requests(1))
    waiting.append(asyncio.create_task(ask(single)))
    await asyncio.sleep(0)
    go.set()
    await first
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert (await ask(single)).status == 200


async def test_close_drops_idle_connections(upstream: Upstream, pool: Pool) -> None:
    await asyncio.gather(ask(pool), ask(pool), ask(pool))
    pool.close()
    await until(lambda: upstream.wait_for_open(0))


async def test_close_lets_those_at_work_end(upstream: Upstream, single: Pool) -> None:
    go = threading.Event()
    upstream.always(scripted.when(go, OK))
    busy = asyncio.create_task(ask(single))
    await until(lambda: upstream.wait_for_requests(1))
    queued = asyncio.create_task(ask(single))
    await asyncio.sleep(0)
    single.close()
    go.set()
    assert (await busy).status == 200
    assert (await queued).status == 200
    await until(lambda: upstream.wait_for_open(0))


async def test_moved_homeserver_is_asked_although_all_connections_wait_for_the_old_one(
    upstream: Upstream, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(upstream.url)
    locator = Locator(file.as_uri(), TLS)
    pool = Pool(locator, TLS, most=1)
    go = threading.Event()
    upstream.always(scripted.when(go, OK))
    first = asyncio.create_task(ask(pool))
    await until(lambda: upstream.wait_for_requests(1))
    queued = asyncio.create_task(ask(pool))
    await asyncio.sleep(0)
    with Upstream(lambda _: OK) as other:
        file.write_text(other.url)
        await locator.refresh()
        assert (await queued).status == 200
        assert (await ask(pool)).status == 200
        assert len(other.requests) == 2
        assert other.accepted == 1
        go.set()
        assert (await first).status == 200
        await until(lambda: upstream.wait_for_open(0))
        assert (await ask(pool)).status == 200
        assert (len(pool), other.accepted) == (1, 1)
    pool.close()


def tls_pool(upstream: Upstream, ca_file: Path | None, host: str = "127.0.0.1") -> Pool:
    tls = tls_context(ca_file)
    return Pool(Locator(f"https://{host}:{upstream.port}", tls), tls, most=1)


async def test_private_authority_is_trusted_when_it_is_named(authority: Authority) -> None:
    ca_file, server_side = authority("mine")
    with Upstream(lambda _: OK, server_side) as upstream:
        pool = tls_pool(upstream, ca_file)
        for _ in range(3):
            assert (await ask(pool)).status == 200
        assert upstream.accepted == 1
        pool.close()


@pytest.mark.parametrize("trusted", ["another", None])
async def test_authority_that_is_not_trusted_is_named_as_the_reason(authority: Authority, trusted: str | None) -> None:
    _, server_side = authority("theirs")
    with Upstream(lambda _: OK, server_side) as upstream:
        pool = tls_pool(upstream, authority(trusted)[0] if trusted else None)
        failure = await fails(ask(pool), Unreachable, f"TLS with https://127.0.0.1:{upstream.port} fails: ")
        assert not failure.sent
        assert "certificate" in str(failure).lower()
        assert "\n" not in str(failure)
        assert upstream.requests == []


async def test_certificate_for_another_name_is_refused(authority: Authority) -> None:
    ca_file, server_side = authority("mine")
    with Upstream(lambda _: OK, server_side) as upstream:
        failure = await fails(ask(tls_pool(upstream, ca_file, "localhost")), Unreachable, "TLS with .* fails")
        assert "localhost" in str(failure)
        assert upstream.requests == []


@pytest.mark.parametrize("speaks_tls", [True, False], ids=["http-to-a-tls-port", "tls-to-an-http-port"])
async def test_wrong_scheme_is_unreachable(authority: Authority, speaks_tls: bool) -> None:
    _, server_side = authority("mine")
    with Upstream(lambda _: OK, server_side if speaks_tls else None) as upstream:
        tls = tls_context(None)
        pool = Pool(Locator(f"{'http' if speaks_tls else 'https'}://127.0.0.1:{upstream.port}", tls), tls, most=1)
        await fails(ask(pool, deadline=SHORT), NoAnswer, ".")
        assert upstream.requests == []
