"""The network between a bridge and its database: a wire on loopback that can be cut, and worse."""

import asyncio
import socket
import struct
from typing import cast

from sqlalchemy import make_url

NOW = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets, and nothing more is sent


class Cable:
    """Carries connections to `host`:`port`. Use it on one event loop; every method acts at once."""

    def __init__(self, host: str, port: int) -> None:
        self._far = (host, port)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._ends: set[_End] = set()
        self.frozen = False
        self.deaf = False
        self.deaf_from: tuple[bytes, bytes] | None = None

    @classmethod
    def to(cls, database_url: str) -> "Cable":
        url = make_url(database_url)
        return cls(url.host or "127.0.0.1", url.port or 5432)

    @property
    def plugged(self) -> bool:
        return self._server is not None

    def url(self, database_url: str) -> str:
        """The same database at this end of the cable."""
        here = make_url(database_url).set(host="127.0.0.1", port=self._port)
        return here.render_as_string(hide_password=False)

    async def plug(self, port: int = 0) -> None:
        """Take connections: from now on, or again."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Near(self), "127.0.0.1", self._port or port)
        self._port = self._server.sockets[0].getsockname()[1]

    def unplug(self) -> None:
        """Reset all connections, and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def cut(self) -> None:
        """Reset all connections. What is in flight is lost in both directions."""
        for end in list(self._ends):
            end.reset()

    def freeze(self) -> None:
        """Nothing arrives any more, and neither side is notified."""
        self.frozen = True
        for end in self._ends:
            end.transport.pause_reading()

    def thaw(self) -> None:
        """What was in flight arrives now."""
        self.frozen = False
        for end in self._ends:
            end.transport.resume_reading()

    def deafen(self) -> None:
        """Requests arrive, but no answers: a commit is made and never confirmed. Ends with `cut` and `hear`."""
        self.deaf = True

    def deafen_from(self, request: bytes, after: bytes) -> None:
        """The same, from the next such request on that comes after such another one on its connection."""
        self.deaf_from = request, after

    def hear(self) -> None:
        self.deaf, self.deaf_from = False, None

    async def connect(self, near: "_Near") -> "_Far":
        loop = asyncio.get_running_loop()
        _, far = await loop.create_connection(lambda: _Far(self, near), *self._far)
        return far

    def opened(self, end: "_End") -> None:
        self._ends.add(end)
        if self.frozen:
            end.transport.pause_reading()

    def closed(self, end: "_End") -> None:
        self._ends.discard(end)


class _End(asyncio.Protocol):
    """One side of one connection."""

    transport: asyncio.Transport

    def __init__(self, cable: Cable) -> None:
        self._cable = cable
        self.other: _End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._cable.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cable.closed(self)
        if self.other is not None:
            self.other.transport.close()

    def reset(self) -> None:
        held = self.transport.get_extra_info("socket")
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
        self.transport.abort()


class _Near(_End):
    """The bridge's side."""

    def __init__(self, cable: Cable) -> None:
        super().__init__(cable)
        self._early = b""
        self._came_after = False
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    def data_received(self, data: bytes) -> None:
        if self._cable.deaf_from is not None:
            request, after = self._cable.deaf_from
            self._came_after = self._came_after or after in data
            if request in data:
                self._cable.deaf = self._cable.deaf or self._came_after
                self._came_after = False
        if self.other is None:
            self._early += data
        else:
            self.other.transport.write(data)

    async def _connect(self) -> None:
        try:
            self.other = await self._cable.connect(self)
        except OSError:
            self.reset()
            return
        if self.transport.is_closing():
            self.other.transport.close()
        else:
            self.other.transport.write(self._early)


class _Far(_End):
    """The database's side."""

    def __init__(self, cable: Cable, near: _Near) -> None:
        super().__init__(cable)
        self.other = near

    def data_received(self, data: bytes) -> None:
        if self.other is not None and not self._cable.deaf:
            self.other.transport.write(data)
