"""flowbridge.homeserver.address: reading addresses, and learning one again.

Well-known over TLS and S3 are tested where there is a server for them.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import certifi
import pytest

from flowbridge.homeserver import address
from flowbridge.homeserver.address import AddressUnknown, Locator
from flowbridge.homeserver.base_url import Address, AddressError, parse_host, parse_url
from flowbridge.models.timing import Timing
from tests.patience import PATIENCE
from tests.unit import Clock

TLS = ssl.create_default_context()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(address, "time", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "base url"
    path.write_text("https://one.example.org\n")
    return path


def locator(base_url: str | Path, *, allow_http: bool = False) -> Locator:
    return Locator(base_url.as_uri() if isinstance(base_url, Path) else base_url, TLS, allow_http=allow_http)


def put(file: Path, content: bytes | str | None) -> None:
    """What the file holds from now on; None: it is gone."""
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


# parse_url


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://hs.example.org", "https://hs.example.org"),
        ("https://hs.example.org/", "https://hs.example.org"),
        ("https://hs.example.org:443", "https://hs.example.org"),
        ("https://hs.example.org:8448/", "https://hs.example.org:8448"),
        ("https://hs.example.org/a/b-c_d.e~f/", "https://hs.example.org/a/b-c_d.e~f"),
        ("HTTPS://HS.Example.org", "https://hs.example.org"),
        ("https://hs.example.org.", "https://hs.example.org."),
        ("https://my_hs", "https://my_hs"),
        ("https://192.0.2.1", "https://192.0.2.1"),
        ("https://[2001:db8::1]:8448", "https://[2001:db8::1]:8448"),
        ("http://127.0.0.1:8008", "http://127.0.0.1:8008"),
        ("http://127.8.9.10:80", "http://127.8.9.10"),
        ("http://localhost:8008/", "http://localhost:8008"),
        ("http://[::1]:8008", "http://[::1]:8008"),
        ("http://hs.localhost", "http://hs.localhost"),
    ],
)
def test_base_url_is_read(text: str, shown: str) -> None:
    assert str(parse_url(text, allow_http=False)) == shown
    assert parse_url(shown, allow_http=False) == parse_url(text, allow_http=False)


@pytest.mark.parametrize("path", ["/_matrix", "/_matrix/", "/_matrix/client", "/synapse/_matrix/client/v3"])
def test_base_url_that_goes_too_far_is_told_where_it_ends(path: str) -> None:
    with pytest.raises(AddressError, match="stops before /_matrix"):
        parse_url(f"https://hs.example.org{path}", allow_http=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hs.example.org",
        "//hs.example.org",
        "ftp://hs.example.org",
        "s3://bucket/key",
        "https:/hs.example.org",
        "https://",
        "https:///path",
        "https://:8448",
        "https://user@hs.example.org",
        "https://user:secret@hs.example.org",
        "https://@hs.example.org",
        "https://hs.example.org?",
        "https://hs.example.org?a=b",
        "https://hs.example.org#",
        "https://hs.example.org/#x",
        "https://hs.example.org:0",
        "https://hs.example.org:65536",
        "https://hs.example.org:-1",
        "https://hs.example.org:http",
        "https://hs.example.org:٨",
        "https://hs example.org",
        "https://hs.example.org ",
        "https://hs.example.org/a b",
        "https://hs.example.org/%2e%2e",
        "https://hs.example.org/../x",
        "https://hs.example.org/./x",
        "https://hs.example.org//x",
        "https://hs.example.org\\x",
        "https://hs..example.org",
        "https://-hs.example.org",
        "https://hs-.example.org",
        "https://hs\0.example.org",
        "https://hs.example.org/\x7f",
        "https://hs\n.example.org",
        "https://hs\t.example.org",
        "https://bücher.example",
        "https://[::1",
        "https://::1]",
        "https://[hs.example.org]",
        "https://[fe80::1%eth 0]",
        f"https://{'a' * 254}",
    ],
)
def test_what_is_no_base_url_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_url(text, allow_http=True)
    assert str(caught.value).isprintable()


def test_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(AddressError) as caught:
        parse_url("https://user:secret@hs.example.org", allow_http=False)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://hs.example.org",
        "http://192.0.2.1",
        "http://10.0.0.1:8008",
        "http://0.0.0.0",
        "http://127.1",
        "http://localhost.example.org",
    ],
)
def test_plain_http_beyond_loopback_needs_leave(text: str) -> None:
    with pytest.raises(AddressError, match="FLOWBRIDGE_ALLOW_HTTP"):
        parse_url(text, allow_http=False)
    assert str(parse_url(text, allow_http=True)) == text


# parse_host


@pytest.mark.parametrize(
    "text", ["m.tekos.co", "m.tekos.co:8448", "localhost", "a.", "192.0.2.1:1", "[::1]", "[2001:db8::1]:65535"]
)
def test_bare_host_is_read(text: str) -> None:
    assert parse_host(text) == text
    parse_url(f"https://{text}", allow_http=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a/b",
        "user@hs",
        "hs?x",
        "hs#",
        "-a",
        "a..b",
        "ü",
        "hs\n",
        "\0",
        "hs:",
        "hs:0",
        "hs:65536",
        "hs:http",
        "hs:-1",
        "hs:٣",
        "::1",
        "[::1",
        "::1]",
        "[[::1]]",
        "[hs]",
        "[hs",
        "hs]",
        "[hs]:1",
        "2001:db8:1:2:3:4:5:6:80",
        "a" * 254,
    ],
)
def test_what_is_no_bare_host_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_host(text)
    assert str(caught.value).isprintable()


# Locator: what is wrong is told when it is made


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        " ",
        "a b",
        "https://hs.example.org/\tx",
        "https://hs\n.example.org",
        "hs.example.org\0",
        "bücher.example",
        "https://hs.example.org?x",
        "http://hs.example.org",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3:///key",
        "file://",
        "file:///",
        "file://host/path",
        "https://" + "a." * 2_000,
    ],
)
def test_malformed_address_is_refused_when_the_locator_is_made(base_url: str) -> None:
    with pytest.raises(AddressError) as caught:
        locator(base_url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("base_url", "seconds"),
    [
        ("https://hs.example.org", None),
        ("http://localhost", None),
        ("m.tekos.co", 3_600),
        ("file:///etc/base_url", 60),
        ("s3://bucket/key", 60),
    ],
)
def test_only_what_can_change_is_asked_for_again(base_url: str, seconds: float | None) -> None:
    assert locator(base_url).refresh_seconds == seconds


def test_ca_file_without_a_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for path in (tmp_path / "ca.pem", tmp_path / "missing.pem"):
        with pytest.raises(AddressError, match="FLOWBRIDGE_CA_FILE") as caught:
            address.tls_context(path)
        assert "\n" not in str(caught.value)
    assert address.tls_context(None).verify_mode is ssl.CERT_REQUIRED


def test_authorities_are_read_for_the_first_connection() -> None:
    context, usual = address.tls_context(None), ssl.create_default_context()
    usual.load_verify_locations(certifi.where())
    assert context.cert_store_stats()["x509"] == 0
    context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="hs.example.org")
    assert context.cert_store_stats() == usual.cert_store_stats()
    assert context.cert_store_stats()["x509_ca"] > 0
    for name in ("verify_mode", "verify_flags", "check_hostname", "options", "minimum_version", "keylog_filename"):
        assert getattr(context, name) == getattr(usual, name)


# Locator: what it learns


async def test_url_stands_as_it_is_and_is_told_once() -> None:
    told: list[Address] = []
    found = locator(" https://hs.example.org/x ")
    found.on_change.append(told.append)
    assert found.known is None
    assert str(await found.address()) == "https://hs.example.org/x"
    await found.refresh()
    assert found.known is await found.address()
    assert told == [found.known]


async def test_file_holds_the_address_and_a_refresh_learns_the_new_one(file: Path) -> None:
    told: list[str] = []
    found = locator(file)
    found.on_change.append(lambda new: told.append(str(new)))
    assert str(await found.address()) == "https://one.example.org"
    put(file, "https://two.example.org/x")
    assert str(await found.address()) == "https://one.example.org"
    await found.refresh()
    await found.refresh()
    assert str(await found.address()) == "https://two.example.org/x"
    assert told == ["https://one.example.org", "https://two.example.org/x"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n",
        b"s3://bucket/key",
        b"file:///etc/passwd",
        b"http://hs.example.org",
        b"https://user:pw@hs.example.org",
        b"https://one.example.org\nhttps://two.example.org",
        b"two words",
        b"\xff\xfe",
        "https://bücher.example".encode(),
        b"x" * 5_000,
        b"#!/bin/sh",
    ],
)
async def test_file_that_holds_no_address_is_one_line_that_names_it(file: Path, content: bytes) -> None:
    put(file, content)
    with pytest.raises(AddressError, match=r"file://.*holds") as caught:
        await locator(file).address()
    assert str(caught.value).isprintable()


async def test_plain_http_in_a_file_follows_the_same_rule(file: Path) -> None:
    put(file, "http://hs.example.org")
    assert str(await locator(file, allow_http=True).address()) == "http://hs.example.org"


async def test_missing_file_is_named_and_found_once_it_is_there(file: Path) -> None:
    put(file, None)
    found = locator(file)
    with pytest.raises(AddressError, match="No such file"):
        await found.address()
    put(file, "https://one.example.org")
    assert str(await found.address()) == "https://one.example.org"


async def test_file_that_changes_is_followed_on_the_interval(file: Path) -> None:
    found = Locator(file.as_uri(), TLS, timing=Timing(address_refresh_seconds=0.01))
    await found.address()
    moved = asyncio.Event()
    found.on_change.append(lambda _: moved.set())
    put(file, b"https://two.example.org")
    following = asyncio.create_task(found.keep_fresh())
    await asyncio.wait_for(moved.wait(), PATIENCE)
    following.cancel()
    assert str(found.known) == "https://two.example.org"


@pytest.mark.parametrize("content", [None, b"rubbish rubbish", b"s3://bucket/key"])
async def test_refresh_that_fails_keeps_the_old_address_and_says_so(
    file: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = locator(file)
    before = await found.address()
    told: list[Address] = []
    found.on_change.append(told.append)
    put(file, content)
    await found.refresh()
    assert found.known is await found.address() is before
    assert told == []
    assert "address_not_refreshed" in [record.msg for record in caplog.records]


async def test_concurrent_first_calls_ask_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    open_ = Path.open

    def counted(path: Path, *args: Any) -> Any:
        asked.append(path)
        return open_(path, *args)

    monkeypatch.setattr(Path, "open", counted)
    found = locator(file)
    answers = await asyncio.gather(*(found.address() for _ in range(50)))
    assert {str(answer) for answer in answers} == {"https://one.example.org"}
    assert asked == [file]


@contextlib.asynccontextmanager
async def unwilling_server() -> AsyncIterator[tuple[str, list[int]]]:
    """A host on loopback that hangs up on everybody, and the list of those who came."""
    came: list[int] = []

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(1)
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", came


async def outcome(asked: Awaitable[Address]) -> str:
    with pytest.raises(AddressUnknown) as caught:
        await asked
    return str(caught.value)


async def test_failed_look_up_is_not_repeated_for_2_seconds(clock: Clock) -> None:
    async with unwilling_server() as (host, came):
        found = locator(host)
        first = await outcome(found.address())
        assert f"https://{host}/.well-known/matrix/client" in first
        clock.now += 1.9
        assert await outcome(found.address()) == first
        assert len(came) == 1
        clock.now += 0.2
        await outcome(found.address())
        assert len(came) == 2


async def test_concurrent_first_calls_fail_together(clock: Clock) -> None:
    async with unwilling_server() as (host, came):
        found = locator(host)
        assert len({*await asyncio.gather(*(outcome(found.address()) for _ in range(50)))}) == 1
        assert len(came) == 1


async def test_file_that_names_a_bare_host_leads_to_its_well_known(file: Path, clock: Clock) -> None:
    async with unwilling_server() as (host, came):
        put(file, host)
        assert host in await outcome(locator(file).address())
        assert len(came) == 1
