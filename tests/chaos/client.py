"""One HTTP/1.1 connection to a loopback port, with one deadline around a whole exchange.

The judge uses no client of the bridge's, so that a fault of that cannot hide here, and none of a library's, so that
the load leaves the machine to those that it judges.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools


class NoAnswer(Exception):
    """Refused, reset, closed without an answer, or out of time."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body's object; empty for anything else."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


class Client:
    """Keeps its connection; makes a new one after a failure. For one question at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._connection: _Connection | None = None

    async def ask(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None, *, seconds: float = 15
    ) -> Answer:
        """Raises NoAnswer; the request may have arrived all the same."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Length: {len(body)}\r\n{lines}"
        )
        try:
            async with asyncio.timeout(seconds):
                connection = await self._connected()
                answer = await connection.ask(head.encode() + b"\r\n" + body)
        except (OSError, TimeoutError, NoAnswer) as error:
            self.close()
            raise NoAnswer(str(error) or type(error).__name__) from None
        except BaseException:
            self.close()
            raise
        if not connection.keep:
            self.close()
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.transport.abort()
            self._connection = None

    async def _connected(self) -> "_Connection":
        if self._connection is None or self._connection.transport.is_closing():
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, self._host, self._port)
        return self._connection


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.keep = True
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Answer] | None = None
        self._headers: dict[str, str] = {}
        self._body = b""

    async def ask(self, request: bytes) -> Answer:
        self._headers, self._body = {}, b""
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._waiter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(NoAnswer("closed without an answer"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.transport.abort()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, chunk: bytes) -> None:
        self._body += chunk

    def on_message_complete(self) -> None:
        self.keep = self._parser.should_keep_alive()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(Answer(self._parser.get_status_code(), self._headers, self._body))
