"""A TCP proxy in front of a homeserver: it notes what is requested, and can be cut."""

import asyncio
import re
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

_REQUEST = re.compile(rb"^[A-Z]+ (\S+) HTTP/1\.1\r$", re.MULTILINE)


class Proxy:
    """Carries connections to this URL. `targets`: what was requested, in order."""

    def __init__(self, url: str) -> None:
        self._far = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self.targets: list[str] = []

    async def __aenter__(self) -> Self:
        await self.plug()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.unplug()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def polls(self) -> int:
        """How many long polls began."""
        return sum("/sync?" in target and "timeout=30000" in target for target in self.targets)

    async def plug(self) -> None:
        """Accept connections, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def unplug(self) -> None:
        """Hang up on every client, and accept no more connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._far.hostname, self._far.port)
            self._writers |= {writer, far_writer}
            await asyncio.gather(self._carry(reader, far_writer, asked=True), self._carry(far_reader, writer))
        except OSError:
            writer.close()
        finally:
            self._carrying.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asked: bool = False) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if asked:
                    self.targets += [target.decode() for target in _REQUEST.findall(data)]
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)
