"""A listener: reads Server-Sent Events as WHATWG HTML specifies."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.patience import PATIENCE as PATIENCE


@dataclass(frozen=True, slots=True)
class Message:
    id: str
    event: str
    data: Any


class Stream:
    """An open stream. `last_id`: what a browser would send in `Last-Event-ID`."""

    def __init__(self, response: httpx.Response, last_id: str = "") -> None:
        self.response = response
        self.last_id = last_id
        self._lines = response.aiter_lines()

    async def next(self) -> Message | None:
        """The next message; None at the end of the stream."""
        async with asyncio.timeout(PATIENCE):
            return await self._next()

    async def message(self) -> dict[str, Any]:
        """The next message, which must be an event of a room."""
        found = await self.next()
        assert found is not None, "the stream has ended"
        assert found.event == "message", found
        return dict(found.data)

    async def body(self) -> str:
        """The text of the next message of a room."""
        return str((await self.message())["content"]["body"])

    async def until_id(self) -> str:
        """The first id that comes, with an event or alone."""
        async with asyncio.timeout(PATIENCE):
            await self._block()
            while not self.last_id:
                await self._block()
        return self.last_id

    async def _next(self) -> Message | None:
        while (block := await self._block()) is not None:
            if "data" in block:
                return Message(self.last_id, block.get("event", "message"), json.loads(block["data"]))
        return None

    async def _block(self) -> dict[str, str] | None:
        """The fields up to the next blank line; None at the end of the stream."""
        found: dict[str, str] = {}
        async for line in self._lines:
            name, _, value = line.partition(": ")
            if not line:
                self.last_id = found.get("id", self.last_id)
                return found
            if not name.startswith(":"):
                found[name] = value
        return None


@asynccontextmanager
async def listening(url: str, token: str = "", *, last_id: str = "", **parameters: str) -> AsyncIterator[Stream]:
    """An open stream at this URL."""
    headers = {"Accept": "text/event-stream"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if last_id:
        headers["Last-Event-ID"] = last_id
    async with (
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as client,
        client.stream("GET", url, headers=headers, params=parameters) as response,
    ):
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code} {(await response.aread()).decode()}")
        yield Stream(response, last_id)
