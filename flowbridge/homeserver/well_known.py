"""Asking a host for its homeserver: `/.well-known/matrix/client` (specification, "Well-known URI")."""

import asyncio
import re
import ssl
from typing import Final
from urllib.parse import urljoin, urlsplit

from flowbridge import __version__
from flowbridge.homeserver.base_url import Address, AddressError, parse_url
from flowbridge.homeserver.connection import NoAnswer, Oversize
from flowbridge.homeserver.dialing import Dialer
from flowbridge.models.proxy import Proxy

MAX_BYTES: Final = 64 * 1024
MAX_REDIRECTS: Final = 3
SECONDS: Final = 10.0  # for all of it
PATH: Final = "/.well-known/matrix/client"

_REDIRECTS = (301, 302, 303, 307, 308)
_TARGET = re.compile(r"/[\x21-\x7e]*")


class UnansweredError(Exception):
    """It cannot be told now; a later attempt may succeed. One line."""


async def ask(host: Address, tls: ssl.SSLContext, proxy: Proxy | None) -> tuple[str, bytes | None]:
    """The URL that answers, and its body; None when there is nothing (404). Raises UnansweredError.

    Redirects are followed, since the specification wants it and large sites have one (to `www.`, or to a CDN). Nothing
    is sent along, and only https is asked: who could change an answer could choose the homeserver.
    """
    dialer = Dialer(tls, proxy)
    url, way = f"{host}{PATH}", ""
    ends = asyncio.get_running_loop().time() + SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        try:
            status, location, body = await _get(url, dialer, ends)
        except Oversize:
            raise UnansweredError(f"{way}{url} answers more than {MAX_BYTES} bytes") from None
        except (NoAnswer, AddressError) as error:
            raise UnansweredError(f"{way}cannot ask {url}: {error}") from None
        if status == 404:
            return url, None
        if status == 200:
            return url, body
        if status not in _REDIRECTS or not location:
            raise UnansweredError(f"{way}{url} answers {status}")
        way, url = f"{way}{url} answers {status}, ", _next(way, url, status, location)
    raise UnansweredError(f"{way}which is one redirect too many: {MAX_REDIRECTS} are followed")


def _next(way: str, url: str, status: int, location: str) -> str:
    """Where a redirect leads. Raises UnansweredError when it is not followed."""
    try:
        found = urljoin(url, location.partition("#")[0])
        is_https = urlsplit(found).scheme == "https"
    except ValueError:  # "[" without its "]"
        found, is_https = location, False
    shown = "".join(character if character.isprintable() else "?" for character in found[:200])
    told = f"{way}{url} answers {status} and leads to {shown}"
    if not is_https:
        raise UnansweredError(f"{told}: that is not https://, so that others could choose the homeserver")
    if f"{found} answers" in told:
        raise UnansweredError(f"{told}: it leads in a circle")
    return found


async def _get(url: str, dialer: Dialer, ends: float) -> tuple[int, str, bytes]:
    """Status, Location and body. Raises NoAnswer, or AddressError for a URL that is none."""
    parts = urlsplit(url)
    address = parse_url(f"{parts.scheme}://{parts.netloc}", allow_http=False)
    target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    if not _TARGET.fullmatch(target):
        raise AddressError("its path is not visible ASCII")
    connection = await dialer.connect(address, lambda _: None, ends)
    try:
        head = f"user-agent: flowbridge/{__version__}\r\naccept: application/json\r\n\r\n".encode()
        await connection.ask(connection.request_line("GET", target) + head, ends, MAX_BYTES)
        location = next((value for name, value in connection.headers if name == b"location"), b"")
        return connection.status, location.decode("latin-1"), connection.body()
    finally:
        connection.abort()
