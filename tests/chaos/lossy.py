"""Between a bridge and a real homeserver: keys for other devices that get lost, syncs that are cut off, and 429s."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import httpx

UPSTREAM_SECONDS = 60.0
RETRY_AFTER_MS = 200

Fate = Literal["well", "limited", "dropped", "lost", "cut"]


@dataclass(frozen=True)
class Chances:
    """Of the requests of each kind. `dropped`: before it has reached the homeserver; `lost`: after that."""

    limited: float = 0.03
    keys_dropped: float = 0.15
    keys_lost: float = 0.15
    syncs_cut: float = 0.15
    sends_lost: float = 0.02

    def draw(self, method: str, path: str, chance: random.Random) -> Fate:
        left = chance.random()
        for share, fate in self._of(method, path):
            if left < share:
                return fate
            left -= share
        return "well"

    def _of(self, method: str, path: str) -> list[tuple[float, Fate]]:
        limited: tuple[float, Fate] = (self.limited, "limited")
        if "/sendToDevice/" in path:
            return [limited, (self.keys_dropped, "dropped"), (self.keys_lost, "lost")]
        if path.endswith("/sync"):
            return [limited, (self.syncs_cut, "cut")]
        if "/send/" in path and method == "PUT":
            return [limited, (self.sends_lost, "lost")]
        return [limited] if "/keys/" in path else []


class Lossy:
    """`counts`: how often each fate befell."""

    def __init__(self, upstream: str, seed: int, chances: Chances = Chances()) -> None:
        self.counts: Counter[str] = Counter()
        self._upstream = upstream
        self._chances = chances
        self._chance = random.Random(seed)
        self._client = httpx.AsyncClient(base_url=upstream, trust_env=False, timeout=UPSTREAM_SECONDS)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Its URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await self._client.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        closed = (OSError, asyncio.IncompleteReadError, httpx.TransportError)
        with contextlib.closing(writer), contextlib.suppress(*closed):
            while await self._exchange(reader, writer):
                pass

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        fate = self._chances.draw(method, target.partition("?")[0], self._chance)
        if "/sendToDevice/" in target and not self.counts["dropped"]:
            fate = "dropped"  # the first always, however short the run
        self.counts[fate] += 1
        if fate == "limited":
            error = {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many requests", "retry_after_ms": RETRY_AFTER_MS}
            writer.write(_answer(429, json.dumps(error).encode()))
            return True
        if fate == "dropped":
            return False
        passed = ("authorization", "content-type")
        kept = {name: value for name, value in headers.items() if name in passed}
        answer = await self._client.request(method, target, headers=kept, content=body)
        if fate == "lost":
            return False
        whole = _answer(answer.status_code, answer.content)
        writer.write(whole[: len(whole) - len(answer.content) // 2 - 1] if fate == "cut" else whole)
        await writer.drain()
        return fate != "cut"


def _answer(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
