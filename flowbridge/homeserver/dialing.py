"""Making a connection to the homeserver: to itself, or through the proxy of FLOWBRIDGE_PROXY.

A proxy carries bytes (CONNECT, RFC 9110 §9.3.6, or SOCKS5) and sees neither tokens nor events of an https homeserver.
CONNECT is our own: python-socks takes the first packet of the answer for all of it, and what comes later for the
homeserver's.
"""

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Callable
from typing import Final, cast

from flowbridge.homeserver.base_url import Address, Origin
from flowbridge.homeserver.connection import Connection, TimedOut, Unreachable
from flowbridge.models.proxy import Proxy

MAX_ANSWER_BYTES: Final = 16 * 1024  # of a proxy to CONNECT
MAX_SHOWN: Final = 100  # characters of its status line in an error


class Dialer:
    """Connects to wherever it is asked to, always by the same way."""

    def __init__(self, tls: ssl.SSLContext, proxy: Proxy | None = None) -> None:
        self._tls = tls
        self._proxy = proxy

    async def connect(self, address: Address, on_lost: Callable[[Connection], None], ends: float) -> Connection:
        """A connection that is made until `ends` (the loop's clock). Raises Unreachable or TimedOut."""
        loop, origin = asyncio.get_running_loop(), address.origin
        tls = self._tls if origin.tls else None

        def made() -> Connection:
            return Connection(loop, address, on_lost)

        try:
            async with asyncio.timeout_at(ends):
                if self._proxy is None:
                    _, connection = await loop.create_connection(made, origin.host, origin.port, ssl=tls)
                elif self._proxy.scheme == "socks5":
                    connection = await self._by_socks(self._proxy, origin, made)
                else:
                    connection = await self._by_connect(self._proxy, origin, made)
        except TimeoutError:
            if self._proxy is not None:
                raise TimedOut(f"the proxy {self._proxy} does not connect to {origin} in time", sent=False) from None
            raise TimedOut(f"{origin} does not accept a connection in time", sent=False) from None
        except ssl.SSLError as error:
            raise Unreachable(f"TLS with {origin} fails: {_reason(error)}", sent=False) from None
        except OSError as error:
            raise Unreachable(f"cannot connect to {origin}: {_reason(error)}", sent=False) from None
        return connection

    async def _by_connect(self, proxy: Proxy, origin: Origin, made: Callable[[], Connection]) -> Connection:
        loop, tls = asyncio.get_running_loop(), self._tls if proxy.scheme == "https" else None
        try:
            transport, asked = await loop.create_connection(
                lambda: _Connect(proxy, origin), proxy.host, proxy.port, ssl=tls
            )
        except ssl.SSLError as error:
            raise Unreachable(f"TLS with the proxy {proxy} fails: {_reason(error)}", sent=False) from None
        except OSError as error:
            raise _unreached(proxy, error) from None
        try:
            await asked.established
            if origin.tls:  # not for the connection yet: it would hear of its end although it was never made
                kept = await loop.start_tls(transport, asyncio.Protocol(), self._tls, server_hostname=origin.host)
                transport = kept or transport
            if transport.is_closing():
                raise _refused(proxy, origin, "it closes the connection")
            connection = made()
            transport.set_protocol(connection)
            connection.connection_made(transport)
        except BaseException:
            transport.abort()
            raise
        return connection

    async def _by_socks(self, proxy: Proxy, origin: Origin, made: Callable[[], Connection]) -> Connection:
        from python_socks import ProxyConnectionError, ProxyError, ProxyType  # here: an extra, which few need
        from python_socks.async_.asyncio import Proxy as Socks

        user, password = (proxy.user, proxy.password) if proxy.user else (None, None)
        way = Socks(ProxyType.SOCKS5, proxy.host, proxy.port, user, password, rdns=True)
        try:
            socket = await way.connect(origin.host, origin.port)
        except ProxyConnectionError as error:
            raise _unreached(proxy, error) from None
        except ProxyError as error:
            raise _refused(proxy, origin, _shown(str(error))) from None
        tls, name = (self._tls, origin.host) if origin.tls else (None, None)
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                made, sock=socket, ssl=tls, server_hostname=name
            )
        except BaseException:
            socket.close()
            raise
        return connection


class _Connect(asyncio.Protocol):
    """Asks a proxy for a tunnel. `established` ends when there is one, or raises Unreachable."""

    def __init__(self, proxy: Proxy, origin: Origin) -> None:
        self._proxy = proxy
        self._origin = origin
        self._answer = b""
        self.established: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        origin = self._origin
        name = f"{f'[{origin.host}]' if ':' in origin.host else origin.host}:{origin.port}"
        lines = [f"CONNECT {name} HTTP/1.1", f"Host: {name}"]
        if self._proxy.user:
            credentials = b64encode(f"{self._proxy.user}:{self._proxy.password}".encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {credentials}")
        cast("asyncio.Transport", transport).write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        if self.established.done():
            return
        self._answer += data
        head, end, behind = self._answer.partition(b"\r\n\r\n")
        if not end:
            if len(head) > MAX_ANSWER_BYTES:
                self._refuse("its answer has no end")
            return
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 1)
        if not words[0].startswith("HTTP/1.") or len(words) < 2:
            self._refuse("its answer is not HTTP/1.1")
        elif words[1][:3] in ("407", "401"):  # tinyproxy says 401 to a wrong password
            held = "does not take the user and password that are in" if self._proxy.user else "wants user:password@ in"
            self._refuse(f"it answers {_shown(words[1])}, and {held} FLOWBRIDGE_PROXY")
        elif words[1][:1] != "2":
            self._refuse(f"it answers {_shown(words[1])}")
        elif behind:
            self._refuse("it says something before it was asked")
        else:
            self.established.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.established.done():
            self._refuse("it closes the connection" if exc is None else _shown(str(exc)))

    def _refuse(self, why: str) -> None:
        self.established.set_exception(_refused(self._proxy, self._origin, why))


def _refused(proxy: Proxy, origin: Origin, why: str) -> Unreachable:
    return Unreachable(f"the proxy {proxy} does not connect to {origin}: {why}", sent=False)


def _unreached(proxy: Proxy, error: OSError) -> Unreachable:
    return Unreachable(f"cannot connect to the proxy {proxy} (FLOWBRIDGE_PROXY): {_reason(error)}", sent=False)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _shown(text: str) -> str:
    """What a proxy says, in a log."""
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_SHOWN]).strip()
