"""The exchange with the homeserver: bodies of any length both ways, kept connections, and what breaks off."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from flowbridge.errors import BadGateway, BadRequest, GatewayTimeout
from flowbridge.homeserver import Locator, relay
from flowbridge.homeserver.relay import Relay
from flowbridge.models.timing import Timing
from tests.patience import PATIENCE

TLS = ssl.create_default_context()
Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Serve = Callable[[Reader, Writer], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.asynccontextmanager
async def homeserver(serve: Serve, timing: Timing = Timing()) -> AsyncIterator[Relay]:
    """A relay to a server that does this on each connection."""

    serving: set[asyncio.Task[None] | None] = set()

    async def guarded(reader: Reader, writer: Writer) -> None:
        serving.add(asyncio.current_task())
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await serve(reader, writer)
        finally:
            writer.close()

    async with await asyncio.start_server(guarded, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        made = Relay(Locator(f"http://127.0.0.1:{port}/prefix", TLS), TLS, timing=timing)
        try:
            yield made
        finally:
            made.close()
            for task in serving:
                if task is not None:
                    task.cancel()


async def head_of(reader: Reader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def pieces(*found: bytes) -> AsyncIterator[bytes]:
    for piece in found:
        yield piece


async def ask(made: Relay, method: str = "GET", body: relay.Body = b"", **headers: bytes) -> tuple[int, bytes]:
    pairs = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    async with made.open(method, "/a%2Fb/?x=1", pairs, body, silence=5) as answer:
        return answer.status, await answer.read(100_000_000)


def answers(*found: bytes) -> Serve:
    """These answers on each connection, one for each request."""

    async def serve(reader: Reader, writer: Writer) -> None:
        for answer in found:
            await head_of(reader)
            writer.write(answer)
        await reader.read()

    return serve


async def test_target_goes_out_behind_the_prefix_and_byte_for_byte() -> None:
    seen = []

    async def serve(reader: Reader, writer: Writer) -> None:
        seen.append(await head_of(reader))
        writer.write(OK)

    async with homeserver(serve) as made:
        assert await ask(made, accept=b"x") == (200, b"ok")
    first, host, *rest = seen[0].split(b"\r\n")
    assert first == b"GET /prefix/a%2Fb/?x=1 HTTP/1.1"
    assert host.startswith(b"host: 127.0.0.1:")
    assert rest == [b"accept: x", b"", b""]


async def test_body_of_unknown_length_goes_in_chunks() -> None:
    seen = []

    async def serve(reader: Reader, writer: Writer) -> None:
        seen.append(await head_of(reader) + await reader.readuntil(b"0\r\n\r\n"))
        writer.write(OK)

    async with homeserver(serve) as made:
        assert await ask(made, "POST", pieces(b"abc", b"", b"defg")) == (200, b"ok")
    assert seen[0].endswith(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")


async def test_body_of_known_length_goes_as_it_is() -> None:
    seen = []

    async def serve(reader: Reader, writer: Writer) -> None:
        seen.append(await head_of(reader) + await reader.readexactly(7))
        writer.write(OK)

    async with homeserver(serve) as made:
        assert await ask(made, "POST", pieces(b"abc", b"defg"), content_length=b"7") == (200, b"ok")
        assert await ask(made, "PUT", b"abcdefg") == (200, b"ok")
    assert all(head.endswith(b"content-length: 7\r\n\r\nabcdefg") for head in seen)


async def test_upload_waits_for_a_homeserver_that_does_not_read() -> None:
    go, given = asyncio.Event(), 0
    piece = b"x" * 65_536

    async def body() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(320):
            given += 1
            yield piece

    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        await go.wait()
        await reader.readexactly(320 * len(piece))
        writer.write(OK)

    async with homeserver(serve) as made:
        asking = asyncio.create_task(ask(made, "POST", body(), content_length=b"%d" % (320 * len(piece))))
        before = -1
        while before != given or not given:  # until nothing moves any more
            before = given
            await asyncio.sleep(0.2)
        assert given < 200, "what the kernel takes, and no more"
        go.set()
        assert await asking == (200, b"ok")
    assert given == 320


async def test_download_waits_for_a_caller_that_does_not_read() -> None:
    written = 0

    async def serve(reader: Reader, writer: Writer) -> None:
        nonlocal written
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n")
        for _ in range(200):
            writer.write(b"x" * 100_000)
            await writer.drain()
            written += 1
        await reader.read()

    async with homeserver(serve) as made, made.open("GET", "/", []) as answer:
        before = -1
        while before != written or not written:
            before = written
            await asyncio.sleep(0.2)
        assert written < 150, "what the kernel takes, and no more"
        assert len(await answer.read(20_000_000)) == 20_000_000


async def test_answer_before_the_end_of_the_upload_is_passed_on() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65_536

    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        await asyncio.sleep(2 * PATIENCE)

    async with homeserver(serve) as made, asyncio.timeout(PATIENCE):
        assert await ask(made, "POST", endless()) == (413, b"no")


@pytest.mark.parametrize(
    ("method", "answer", "expected"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", (200, b"")),
        ("GET", b"HTTP/1.1 204 No\r\n\r\n", (204, b"")),
        ("GET", b"HTTP/1.1 304 No\r\nContent-Length: 99\r\n\r\n", (304, b"")),
        ("GET", b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK, (200, b"ok")),
        (
            "GET",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Trailer: 1\r\n\r\n",
            (200, b"ok"),
        ),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", (200, b"")),
    ],
)
async def test_answer_is_read_to_its_end(method: str, answer: bytes, expected: tuple[int, bytes]) -> None:
    async with homeserver(answers(answer)) as made, asyncio.timeout(PATIENCE):
        assert await ask(made, method) == expected


async def test_answer_that_ends_with_its_connection_is_read() -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")

    async with homeserver(serve) as made:
        assert await ask(made) == (200, b"abc")


async def test_connection_is_kept_for_gets_and_another_is_made_for_what_may_not_be_repeated() -> None:
    connections = 0

    async def serve(reader: Reader, writer: Writer) -> None:
        nonlocal connections
        connections += 1
        while True:
            await head_of(reader)
            writer.write(OK)

    async with homeserver(serve) as made:
        for _ in range(3):
            assert await ask(made) == (200, b"ok")
        assert connections == 1
        assert await ask(made, "POST") == (200, b"ok")
        assert connections == 2


async def test_kept_connection_that_is_gone_costs_nobody_an_answer() -> None:
    asked = 0

    async def serve(reader: Reader, writer: Writer) -> None:
        nonlocal asked
        await head_of(reader)
        asked += 1
        writer.write(OK)
        await head_of(reader)  # hangs up over the second

    async with homeserver(serve) as made:
        assert [await ask(made) for _ in range(3)] == [(200, b"ok")] * 3
    assert asked == 3


async def test_body_that_breaks_off_is_no_answer() -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")

    async with homeserver(serve) as made, made.open("GET", "/", []) as answer:
        chunks = answer.chunks()
        assert await anext(chunks) == b"abc"
        with pytest.raises(BadGateway, match="in the middle of an answer"):
            await anext(chunks)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 60_000,
    ],
    ids=["garbage", "upgrade", "endless-headers"],
)
async def test_what_is_no_answer_is_a_bad_gateway(answer: bytes) -> None:
    async with homeserver(answers(answer)) as made, asyncio.timeout(PATIENCE):
        with pytest.raises(BadGateway):
            await ask(made)


async def test_silence_is_a_timeout_before_an_answer_and_in_it() -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        if b"/head" not in await head_of(reader):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        await reader.read()

    async with homeserver(serve) as made:
        with pytest.raises(GatewayTimeout):
            async with made.open("GET", "/head", [], silence=0.05):
                pass
        async with made.open("GET", "/body", [], silence=0.05) as answer:
            with pytest.raises(GatewayTimeout):
                await answer.read(9)


async def test_homeserver_that_takes_no_body_is_a_timeout() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65_536

    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        await asyncio.sleep(2 * PATIENCE)

    async with homeserver(serve, Timing(upload_stall_seconds=0.1)) as made, asyncio.timeout(PATIENCE):
        with pytest.raises(GatewayTimeout, match="nothing of the body"):
            await ask(made, "POST", endless())


async def test_leaving_early_ends_the_exchange_at_once() -> None:
    ended = asyncio.Event()

    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        with contextlib.suppress(OSError):
            await reader.read()
        ended.set()

    async with homeserver(serve) as made, asyncio.timeout(PATIENCE):
        async with made.open("GET", "/", []):
            pass
        await ended.wait()


async def test_connection_whose_answer_was_not_taken_serves_nobody_else() -> None:
    """Reading was paused behind 64 KiB of it, and the next answer would never have been seen."""

    sent = asyncio.Event()

    async def serve(reader: Reader, writer: Writer) -> None:
        writer.transport.set_write_buffer_limits(0)
        while True:
            await head_of(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)
            await writer.drain()
            sent.set()

    async with homeserver(serve) as made, asyncio.timeout(PATIENCE):
        for _ in range(3):
            async with made.open("GET", "/", []) as answer:
                await sent.wait()
                sent.clear()
                for _ in range(10):
                    await asyncio.sleep(0)  # all of it is read from the socket
            assert answer.status == 200
        assert await ask(made) == (200, b"x" * 100_000)


async def test_nobody_there_is_a_bad_gateway() -> None:
    made = Relay(Locator("http://127.0.0.1:1", TLS), TLS)
    with pytest.raises(BadGateway, match="cannot connect"):
        await ask(made)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"accept", b"x\r\nX: y"),
        (b"accept", b"x\ry"),
        (b"accept", b"x\ny"),
        (b"accept", b"x\0y"),
        (b"accept", b"x\x7fy"),
        (b"x\r\ny", b"x"),
        (b"x y", b"x"),
        (b"x:y", b"x"),
        (b"transfer-encoding ", b"chunked"),
        (b"transfer-encoding", b"chunked"),
        (b"host", b"elsewhere"),
        (b"content-length", b"+2"),
        (b"content-length", b"2, 2"),
        (b"content-length", b""),
        (b"", b"x"),
    ],
)
async def test_header_that_could_be_read_as_another_goes_nowhere(name: bytes, value: bytes) -> None:
    async with homeserver(answers(OK)) as made:
        with pytest.raises(BadRequest):
            async with made.open("POST", "/", [(name, value)], b"{}"):
                pass


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: y", "/a\n", "/a\0", "/\xe4", ""])
async def test_target_that_could_end_its_line_goes_nowhere(target: str) -> None:
    async with homeserver(answers(OK)) as made:
        with pytest.raises(BadRequest):
            async with made.open("GET", target, []):
                pass


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"7")]], ids=["chunks", "length"])
@pytest.mark.parametrize(
    "decoy",
    [
        (b"x-transfer-encoding", b"chunked"),
        (b"x-a", b"transfer-encoding: chunked"),
        (b"content-type", b"image/png; a=transfer-encoding: chunked"),
        (b"x-content-length", b"3"),
        (b"x-a", b"content-length: 3"),
    ],
)
async def test_framing_is_chosen_by_no_text_that_is_in_a_header(
    decoy: tuple[bytes, bytes], headers: list[tuple[bytes, bytes]]
) -> None:
    """A search in the head let the body go in chunks beside its length: what came behind was another request."""
    seen = bytearray()
    whole = b"abcdefg" if headers else b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"

    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        seen.extend(await reader.readexactly(len(whole)))
        writer.write(OK)
        seen.extend(await reader.read())

    body = pieces(b"abc", b"defg")
    async with (
        asyncio.timeout(PATIENCE),
        homeserver(serve) as made,
        made.open("POST", "/", [decoy, *headers], body) as answer,
    ):
        assert await answer.read(9) == b"ok"
    assert seen == whole


@pytest.mark.parametrize("body", [[b"abc"], [b"abc", b"defgh"], [b"abcdefg", b"h"], []])
async def test_body_of_another_length_than_its_head_says_ends_the_connection(body: list[bytes]) -> None:
    seen, ended = bytearray(), asyncio.Event()

    async def serve(reader: Reader, writer: Writer) -> None:
        await head_of(reader)
        try:
            while data := await reader.read(100):
                seen.extend(data)
        except OSError:  # hung up on, and not gently
            pass
        ended.set()

    async with homeserver(serve) as made, asyncio.timeout(PATIENCE):
        with pytest.raises(BadRequest, match="7 bytes"):
            await ask(made, "POST", pieces(*body), content_length=b"7")
        await ended.wait()
    assert b"abcdefg".startswith(seen), "what is too much is not written"


async def test_body_in_one_piece_of_another_length_goes_nowhere() -> None:
    async with homeserver(answers(OK)) as made:
        with pytest.raises(BadRequest, match="7 bytes"):
            await ask(made, "PUT", b"abc", content_length=b"7")


@pytest.mark.parametrize("length", [{}, {"content_length": b"3"}], ids=["chunks", "length"])
async def test_connection_that_an_upload_was_streamed_on_serves_nobody_else(length: dict[str, bytes]) -> None:
    connections = 0

    async def serve(reader: Reader, writer: Writer) -> None:
        nonlocal connections
        connections += 1
        while True:
            head = await head_of(reader)
            if head.startswith(b"POST"):
                await (reader.readexactly(3) if length else reader.readuntil(b"0\r\n\r\n"))
            writer.write(OK)

    async with homeserver(serve) as made:
        assert await ask(made, "POST", pieces(b"abc"), **length) == (200, b"ok")
        assert await ask(made) == (200, b"ok")
        assert connections == 2
        assert await ask(made) == (200, b"ok")
        assert connections == 2


async def test_framing_in_the_text_of_an_answers_header_frames_nothing() -> None:
    decoys = b"X-Transfer-Encoding: chunked\r\nX-A: transfer-encoding: chunked\r\nX-Content-Length: 1\r\n"
    answer = OK.replace(b"\r\n", b"\r\n" + decoys, 1)
    async with homeserver(answers(answer, answer)) as made, asyncio.timeout(PATIENCE):
        for _ in range(2):
            assert await ask(made) == (200, b"ok")
