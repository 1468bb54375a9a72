"""A client that requests one thing repeatedly: `python -m benchmarks.hog NAME URL RATE`, until it is terminated.

RATE is requests/s in all, 0 for as fast as they are answered. It takes no notice of a 429. At the end it prints how
many answers it had, by status, in the time that it ran.
"""

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvloop

from benchmarks.load import MESSAGE, SEND_PATH

CALLERS = 16
HOG_TOKEN = "syt_hog_benchmark"
MEGABYTES = 8 * 1024 * 1024
SURROGATES = b'["' + b"\\ud83d\\ude00" * ((MEGABYTES - 16) // 12) + b'"]'
WRONG = json.dumps({"msgtype": "m.image", "info": {str(n): 1 for n in range(1_000)}, "file": [{}] * 500}).encode()
MESSAGES_PATH = SEND_PATH.replace("/send/m.room.message", "/messages")
MARKDOWN_BOMB = json.dumps(
    {"markdown": ("|a" * 60 + "\n") * 2 + ("|-" * 60 + "\n") + ("|a" * 60 + "\n") * 120}
).encode()
HTML_BOMB = json.dumps({"html": "<b><i>" * 49 + "<a href='x'>" * 2_000}).encode()
BOMB_SECRET = "fh_benchmark-of-a-template-that-never-ends"
TEMPLATE_BOMB = (
    "{% if payload.n %}{% set a = namespace(x=[1]) %}{% for i in range(40) %}{% set a.x = a.x + a.x %}{% endfor %}"
    "{% endif %}{{ payload.n }}"
)
HOOKS = json.dumps(
    [
        {
            "name": "bomb",
            "room": "!hog:example.org",
            "template": {"text": TEMPLATE_BOMB},
            "verification": {"secret": BOMB_SECRET},
        },
    ]
)
LARGE = json.dumps({"msgtype": "m.image", "url": 5, "m.mentions": {"user_ids": [{"a": [1] * 20}] * 6_000}}).encode()


@dataclass(frozen=True)
class Hog:
    """What it asks. `keeps`: its connection, from one answer to the next; `waits`: seconds for which it holds one."""

    about: str
    request: Callable[[], bytes]
    keeps: bool = True
    waits: float = 0.0


def _get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: bridge", *headers, "", ""]).encode()


def _post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: bridge", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def _send(*headers: str) -> bytes:
    return _post(SEND_PATH, MESSAGE.encode(), *headers)


HOGS: dict[str, Hog] = {
    "openapi": Hog("`GET /openapi.json`", lambda: _get("/openapi.json")),
    "docs": Hog("`GET /docs/swagger-ui-bundle.js`, 1.5 MB", lambda: _get("/docs/swagger-ui-bundle.js")),
    "readyz": Hog("`GET /readyz`", lambda: _get("/readyz")),
    "wrong keys": Hog(
        "a send with another wrong API key each time", lambda: _send(f"X-API-Key: fb_{secrets.token_hex(16)}")
    ),
    "one wrong key": Hog("a send with the same wrong API key", lambda: _send("X-API-Key: fb_wrong")),
    "unknown tokens": Hog(
        "a send with another unknown token each time", lambda: _send(f"Authorization: Bearer {secrets.token_hex(16)}")
    ),
    "long bodies": Hog(
        "8 MB of surrogate pairs to `/_matrix/…` without a token",
        lambda: _post("/_matrix/client/v3/other", SURROGATES),
        keeps=False,
    ),
    "wrong payloads": Hog(
        "`POST /validate`, 20 kB with hundreds of mistakes", lambda: _post("/validate/m.room.message", WRONG)
    ),
    "wrong sends": Hog(
        "a send of one token, 20 kB with hundreds of mistakes",
        lambda: _post(SEND_PATH, WRONG, f"Authorization: Bearer {HOG_TOKEN}"),
    ),
    "wrong messages": Hog(
        "a send of one token, 30 bytes with a mistake",
        lambda: _post(SEND_PATH, b'{"msgtype": "m.image", "url": 5}', f"Authorization: Bearer {HOG_TOKEN}"),
    ),
    "large payloads": Hog(
        "`POST /validate`, 400 kB with thousands of mistakes", lambda: _post("/validate/m.room.message", LARGE)
    ),
    "markdown bombs": Hog(
        "messages of one token, 15 kB of Markdown tables",
        lambda: _post(MESSAGES_PATH, MARKDOWN_BOMB, f"Authorization: Bearer {HOG_TOKEN}"),
    ),
    "html bombs": Hog(
        "messages of one token, 24 kB of HTML that is never closed",
        lambda: _post(MESSAGES_PATH, HTML_BOMB, f"Authorization: Bearer {HOG_TOKEN}"),
    ),
    "endless templates": Hog(
        "requests to a hook whose template never ends",
        lambda: _post(f"/hooks/bomb/{BOMB_SECRET}", json.dumps({"n": secrets.token_hex(8)}).encode()),
    ),
    "polls": Hog(
        "`GET /events` of one token, held for a second",
        lambda: _get("/events?from=s1&timeout=30000", f"Authorization: Bearer {HOG_TOKEN}"),
        keeps=False,
        waits=1.0,
    ),
    "streams": Hog(
        "`GET /live` of one token, opened and closed",
        lambda: _get("/live", f"Authorization: Bearer {HOG_TOKEN}"),
        keeps=False,
    ),
}


class _Caller:
    """One connection at a time, one request at a time."""

    def __init__(self, hog: Hog, host: str, port: int, pace: float, answers: Counter[str]) -> None:
        self._hog, self._host, self._port, self._pace = hog, host, port, pace
        self._answers = answers

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            try:
                reader, writer = await asyncio.open_connection(self._host, self._port, limit=2**22)
                try:
                    while True:
                        if self._pace:
                            due = max(due + self._pace, time.monotonic() - self._pace)
                            await asyncio.sleep(due - time.monotonic())
                        await self._ask(reader, writer)
                        if not self._hog.keeps:
                            break
                finally:
                    writer.transport.abort()
            except (OSError, asyncio.IncompleteReadError, EOFError):
                self._answers["none"] += 1
                await asyncio.sleep(0.01)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._hog.request())
        if self._hog.waits:
            await asyncio.wait({asyncio.ensure_future(reader.read(1))}, timeout=self._hog.waits)
            self._answers["held"] += 1
            return
        head = await reader.readuntil(b"\r\n\r\n")
        self._answers[head.split(b" ", 2)[1].decode()] += 1
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.partition(b":")[2]))


async def _main(name: str, url: str, rate: float) -> None:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    answers: Counter[str] = Counter()
    pace = CALLERS / rate if rate else 0.0
    tasks = [
        asyncio.create_task(_Caller(HOGS[name], parts.hostname, parts.port, pace, answers).run())
        for _ in range(CALLERS)
    ]
    began = time.monotonic()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    print("ready", flush=True)
    await stopped.wait()
    for task in tasks:
        task.cancel()
    print(json.dumps({"seconds": time.monotonic() - began, "answers": answers}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
