"""flowbridge.outbound.fetch: files from servers that hang, drip, lie, and redirect for ever."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.models.timing import Timing
from flowbridge.outbound import fetch
from flowbridge.outbound.destination import Allowed
from flowbridge.outbound.fetch import Fetched, Fetcher, FileTooLarge, NotFetched
from tests.patience import PATIENCE

Serve = Callable[[str, asyncio.StreamWriter], Awaitable[None]]

MOST = 1_000_000
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


@asynccontextmanager
async def web(serve: Serve) -> AsyncIterator[tuple[str, list[str]]]:
    """A web server on this machine; the heads of the requests that it gets."""
    seen: list[str] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            seen.append(head)
            await serve(head.split(" ")[1], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


@asynccontextmanager
async def fetcher(*allowed: str, seconds: float = PATIENCE, silence: float = PATIENCE) -> AsyncIterator[Fetcher]:
    timing = Timing(fetch_seconds=seconds, fetch_silence_seconds=silence)
    found = Fetcher(ssl.create_default_context(), Allowed(allowed or ["127.0.0.0/8"]), timing=timing)
    try:
        yield found
    finally:
        await found.close()


def plain(data: bytes) -> Serve:
    """Answers with these bytes."""

    async def serve(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return serve


async def read(
    url: str, most: int = MOST, *, seconds: float = PATIENCE, silence: float = PATIENCE
) -> tuple[Fetched, bytes]:
    async with fetcher(seconds=seconds, silence=silence) as found, found.open(url, most) as fetched:
        return fetched, b"".join([piece async for piece in fetched.body])


async def failure(serve: Serve, path: str = "/", *, seconds: float = PATIENCE, silence: float = PATIENCE) -> str:
    async with web(serve) as (url, _):
        with pytest.raises(NotFetched) as caught:
            await read(url + path, seconds=seconds, silence=silence)
    return str(caught.value)


async def test_file_comes_with_its_name_type_and_length() -> None:
    async with web(plain(OK + b"Content-Length: 5\r\n\r\nhello")) as (url, seen):
        fetched, body = await read(f"{url}/pictures/a%20cat.png?size=1#x")
    assert body == b"hello"
    assert (fetched.filename, fetched.content_type, fetched.length) == ("a cat.png", "image/png", 5)
    head = seen[0].lower()
    assert head.startswith("get /pictures/a%20cat.png?size=1 http/1.1\r\n")
    assert f"host: {url[7:]}\r\n" in head
    assert "accept-encoding: identity" in head


async def test_server_may_name_the_file_and_keep_its_length_to_itself() -> None:
    disposition = b"Content-Disposition: attachment; filename*=UTF-8''gr%C3%BC%C3%9Fe.txt\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with web(plain(OK + disposition + chunks)) as (url, _):
        fetched, body = await read(f"{url}/x")
    assert (fetched.filename, fetched.length, body) == ("grüße.txt", None, b"abc")


async def test_three_redirects_are_followed_and_no_more() -> None:
    async def serve(path: str, writer: asyncio.StreamWriter) -> None:
        left = int(path[1:])
        if left:
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: /%d\r\nContent-Length: 0\r\n\r\n" % (left - 1))
        else:
            writer.write(OK + b"Content-Length: 2\r\n\r\nok")

    async with web(serve) as (url, _):
        assert (await read(f"{url}/3"))[1] == b"ok"
    assert await failure(serve, "/4") == "redirects more than 3 times"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        (b"file:///etc/passwd", "redirects to an address that is not a URL that begins with https:// or http://"),
        (b"http://user:pw@127.0.0.1/", "redirects to an address that holds a user name or password"),
        (b"http://[::1]:1/", "leads to an address that is not on the internet"),
        (b"//0x7f.1:1/", "cannot be reached"),  # 127.0.0.1, which is allowed here
        (b"", "redirects to nowhere"),
        (b"http://[::1/", "redirects to what is not a URL"),
    ],
)
async def test_where_a_redirect_leads_is_checked_again(location: bytes, reason: str) -> None:
    answer = plain(b"HTTP/1.1 301 x\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")
    async with web(answer) as (url, _), fetcher("127.0.0.1") as found:
        with pytest.raises(NotFetched, match=reason):
            async with found.open(url, MOST):
                pass


@pytest.mark.parametrize("length", [b"", b"Content-Length: 2000000\r\n"], ids=["not-told", "told"])
async def test_file_that_is_too_large_is_refused_without_reading_it_to_its_end(length: bytes) -> None:
    sent = 0

    async def serve(_: str, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + length + b"\r\n")
        while sent < 200 * MOST:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()

    async with web(serve) as (url, _):
        with pytest.raises(FileTooLarge, match="larger than 1000000 bytes"):
            await read(url)
    assert sent < 100 * MOST


async def test_length_that_is_a_lie_is_found_out() -> None:
    assert "broke off" in await failure(plain(OK + b"Content-Length: 100\r\n\r\nshort"))
    async with web(plain(OK + b"Content-Length: 3\r\n\r\nlonger")) as (url, _):
        assert (await read(url))[1] == b"lon"


@pytest.mark.parametrize("begins", [b"", OK, OK + b"Content-Length: 10\r\n\r\n123"])
async def test_server_that_falls_silent_is_given_up(begins: bytes) -> None:
    async def serve(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(begins)
        await writer.drain()
        await asyncio.sleep(PATIENCE)

    assert "did not arrive in time" in await failure(serve, silence=0.2)


async def test_server_that_drips_is_given_up_although_it_is_never_silent() -> None:
    async def serve(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    assert "did not arrive in time" in await failure(serve, seconds=0.5)


async def test_time_that_the_reader_takes_is_not_the_servers() -> None:
    async def serve(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"\r\n")
        for _piece in range(4):
            writer.write(b"x" * 100_000)
            await writer.drain()

    async with web(serve) as (url, _), fetcher(seconds=1.0) as found, found.open(url, MOST) as fetched:
        size, began = 0, time.monotonic()
        async for piece in fetched.body:
            size += len(piece)
            if time.monotonic() - began < 1.5:
                await asyncio.sleep(0.5)  # as a homeserver that takes its time
    assert size == 400_000
    assert time.monotonic() - began > 1.0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers 404"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 0\r\n\r\n", "answers 206"),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 0\r\n\r\n", "sends the file compressed (gzip)"),
        (b"not http at all\r\n\r\n", "broke off"),
        (b"", "broke off"),
    ],
)
async def test_what_is_no_file_is_told(answer: bytes, reason: str) -> None:
    assert reason in await failure(plain(answer))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "is not a URL that begins with https:// or http://"),
        ("ftp://example.org/x", "is not a URL that begins with https:// or http://"),
        ("gopher://127.0.0.1:6379/_x", "is not a URL that begins with https:// or http://"),
        ("cat.png", "is not a URL that begins with https:// or http://"),
        ("http:///x", "is not a URL that begins with https:// or http://"),
        ("http://a:b@example.org/", "holds a user name or password"),
        ("http://[::1", "is not a URL"),
        ("http://xn--a", "is not a URL"),
        ("http://xn--/x", "is not a URL"),
        ("http://127.0.0.1:99999/", "names a port that there is not"),
        ("http://x\r\ny/", "is not a URL"),
        ("http://" + "x" * 3_000, "is longer than 2048 bytes"),
        ("http://127。0。0。1:1/", "leads to an address that is not on the internet"),
        ("http://[::ffff:127.0.0.1]:1/", "leads to an address that is not on the internet"),
        ("http://nothing.invalid/", "cannot be reached: the name nothing.invalid is not known"),
    ],
)
async def test_url_that_cannot_or_may_not_be_fetched_is_told(url: str, reason: str) -> None:
    async with fetcher("10.0.0.0/8") as found:
        with pytest.raises(NotFetched) as caught:
            async with found.open(url, MOST):
                pass
    assert reason in str(caught.value)


# ruff: noqa: SIM905
PIECES = """http:// https:// // a xn-- xn--a 。 K ß : 65536 -1 @ [ ] ::1 % %zz %00 / .. ? # é 💥 127.0.0.1""".split()


@given(st.lists(st.sampled_from([*PIECES, " ", "\0", "\r\n", "\xad", "\ud800", "a" * 300]), max_size=8).map("".join))
def test_any_text_is_a_url_or_is_told(text: str) -> None:
    for read_one in (fetch.parse, partial(fetch._redirected, fetch.parse("http://h/x"))):
        for address in (text, f"http://{text}"):
            with contextlib.suppress(NotFetched):
                url = read_one(address)
                fetch._raw(url)
                fetch._headers(url)


async def test_private_addresses_are_fetched_from_only_when_they_are_allowed() -> None:
    async with web(plain(OK + b"Content-Length: 2\r\n\r\nok")) as (url, seen):
        async with fetcher("10.0.0.0/8") as found:
            with pytest.raises(NotFetched, match="FLOWBRIDGE_FETCH_ALLOW"):
                async with found.open(url, MOST):
                    pass
        assert seen == []
        assert (await read(url))[1] == b"ok"
