"""Raw HTTP by chance: heads, bodies, pipelines, segments, hang-ups. What came of it is compared with what was sent.

Every conversation is made from the seed and its number alone, so that one that found something can be had again.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote, urlsplit

from tests.chaos.rooms import sum_of

Kind = Literal["validate", "send", "pass", "upload", "media", "read", "last"]

PATIENCE = 60.0  # seconds for a whole conversation
SEARCH = "/_matrix/client/v3/user_directory/search"  # answered with `sha256`, that of the body as it came
UPLOAD = "/_matrix/media/v3/upload"  # answered with a content_uri that ends with it, also when it comes by MEDIA
MEDIA = "/media"
LONG = 600_000  # bytes: such a body goes to the disk, and from there to the homeserver
DEEP = 80  # requests of a long pipeline: more bytes than the bridge reads ahead
FLUSH = (1_460, 4_096, 8_192, 16_384)  # where proxies and networks like to end a segment

# What a reader that looks for the end of a head, or for a header, would find in a body.
_WORDS = (
    "\nupgrade: h2c\n",
    "\r\nUpgrade: websocket\r\nConnection: upgrade\r\n",
    "\r\n\r\n",
    "0\r\n\r\n",
    "POST /validate/m.room.message HTTP/1.1\r\nHost: bridge\r\nContent-Length: 0\r\n\r\n",
    "GET /healthz HTTP/1.1\r\n\r\n",
    "\ncontent-length: 5\r\n",
    "X-API-Key: fb_stolen\r\n",
    "HTTP/1.1 200 OK\r\n",
    "%00%0d%0a",
    "ä€😀",
    "\t",
    "x" * 300,
    "some words ",
)
_OFFERS = (
    ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAAAAIAAAAB"],
    ["connection: keep-alive, Upgrade", "upgrade: websocket", "Sec-WebSocket-Key: x"],
    ["UPGRADE: TLS/1.0, h2c", "Upgrade: foo/2", "Connection: x", "Connection: upgrade"],
    ["Proxy-Connection: upgrade", "Upgrade: h2c"],
    ["Upgrade: h2c"],
    ["Connection: upgrade"],
)
# What a reader that looks for a framing, or for a header, would find in a head.
_DECOYS = (
    "X-Transfer-Encoding: chunked",
    "X-A: transfer-encoding: chunked",
    "Transfer-Encoding-X: chunked",
    "Accept: */*; a=transfer-encoding: chunked",
    "X-Content-Length: 3",
    "X-A: b, content-length: 0",
    "Content-Length-X: 7",
    "X-A: host: elsewhere",
    "X-A: authorization: Bearer stolen",
    "Connection: transfer-encoding, content-length",
    "TE: chunked",
    "Trailer: content-length",
)
_TYPES = ("text/plain", "image/png; a=transfer-encoding: chunked", "image/png; content-length: 3", "image/png")
_BROKEN = (
    b"garbage\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nNo colon\r\n\r\n",
    b"CONNECT bridge:80 HTTP/1.1\r\nHost: bridge\r\n\r\n",
    b"POST /validate/m.room.message HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /validate/m.room.message HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /validate/m.room.message HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    b"POST /validate/x HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
)


@dataclass(frozen=True, slots=True)
class Expected:
    """An answer: of a request of this kind, with this body; `n`: the number of an event that it sends."""

    kind: Kind
    body: bytes = b""
    n: int = -1


@dataclass(frozen=True, slots=True)
class Conversation:
    """`ends`: where a segment ends; `paused`: those of them behind which it waits.

    `heard`: how many answers the caller waits for before it hangs up.
    """

    name: str
    data: bytes
    expected: tuple[Expected, ...]
    ends: tuple[int, ...]
    paused: frozenset[int]
    heard: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose conversations these are: one room, one header that says who it is."""

    room: str
    header: str
    name: str


@dataclass
class Found:
    """`faults`: what was not as it must be, with the conversation's name."""

    conversations: int = 0
    requests: int = 0
    faults: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


def text_of(chance: random.Random) -> str:
    """Never to be taken for JSON or white space: the bridge would read it as such."""
    return f"t{''.join(chance.choices(_WORDS, k=chance.choice((0, 1, 3, 8, 30))))}."


def message(text: str, n: int) -> bytes:
    """An event's content; its sum is what the homeserver is to compare with."""
    content = {"msgtype": "m.text", "body": text, "n": n, "sum": sum_of(text.encode())}
    return json.dumps(content, ensure_ascii=False).encode()


def converse(seed: str, caller: Caller, n: int) -> Conversation:
    """A conversation by chance; the events that it sends are numbered from `n`."""
    chance = random.Random(seed)
    data, expected = bytearray(), []
    for number in range(chance.choice((1, 1, 2, 3, 6)) if chance.random() < 0.97 else DEEP):
        data += b"\r\n" * chance.choice((0, 0, 0, 0, 1, 2))  # RFC 9112 §2.2
        kind: Kind = chance.choice(("validate", "validate", "send", "pass", "upload", "media", "read"))
        made, one = _request(chance, kind, caller, n, f"{seed}-{number}")
        n += kind == "send"
        data += made
        expected.append(one)
    if chance.random() < 0.15:
        data += chance.choice(_BROKEN)
        expected.append(Expected("last"))
    ends = _segments(chance, bytes(data))
    paused = frozenset(chance.sample(ends, min(len(ends), 3)))
    heard = len(expected) if chance.random() < 0.9 else chance.randrange(len(expected))
    return Conversation(seed, bytes(data), tuple(expected), tuple(ends), paused, heard)


def _request(chance: random.Random, kind: Kind, caller: Caller, n: int, key: str) -> tuple[bytes, Expected]:
    text = text_of(chance)
    if kind == "read":
        method, target, body = "GET", "/healthz", b""
    elif kind == "validate":
        method, target, body = "POST", "/validate/m.room.message", text.encode()
    elif kind == "send":
        method, target = "PUT", f"/rooms/{quote(caller.room, safe='')}/send/m.room.message/{key.replace(':', '-')}"
        body = message(text, n)
    elif kind == "media":
        method, target, body = "POST", MEDIA, text.encode()
    else:
        if kind == "pass" and chance.random() < 0.03:
            text += "x" * LONG
        method, target, body = "POST", SEARCH if kind == "pass" else UPLOAD, message(text, n)
    type_ = "text/plain" if kind in ("validate", "send") else chance.choice(_TYPES)
    lines = ["Host: bridge", f"Content-Type: {type_}"]
    if chance.random() < 0.5:
        lines += chance.sample(_DECOYS, chance.choice((1, 2, 3)))
    if kind != "validate":
        lines.append(caller.header)
    if chance.random() < 0.5:
        lines += chance.choice(_OFFERS)
    if chance.random() < 0.2:
        lines.append("Expect: 100-continue")
    wire = body
    if kind != "read" and chance.random() < 0.4:
        lines.append("Transfer-Encoding: chunked")
        wire = _chunked(chance, body)
    elif body or chance.random() < 0.5:
        lines.append(f"Content-Length: {len(body)}")
    chance.shuffle(lines)
    lines = [_disguised(chance, line) for line in lines]
    if chance.random() < 0.3:
        size = chance.choice(FLUSH) + chance.randint(-4, 4) - sum(len(line) + 2 for line in lines) - 40
        lines.insert(chance.randrange(len(lines)), f"X-Padding: {'p' * max(0, size)}")
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""]).encode()
    return head + wire, Expected(kind, body, n if kind == "send" else -1)


def _disguised(chance: random.Random, line: str) -> str:
    """The same header, written otherwise."""
    name, _, value = line.partition(": ")
    name = chance.choice((str, str.lower, str.upper))(name)
    # llhttp refuses a tab behind `chunked`, which does no harm.
    behind = "" if name.lower() == "transfer-encoding" else chance.choice(("", "", " ", "\t"))
    return f"{name}:{chance.choice(('', ' ', '  ', chr(9)))}{value}{behind}"


def _chunked(chance: random.Random, body: bytes) -> bytes:
    wire, at = bytearray(), 0
    while at < len(body):
        piece = body[at : at + chance.choice((1, 2, 16, 255, 4_096))]
        at += len(piece)
        wire += b"%x%b\r\n%b\r\n" % (len(piece), chance.choice((b"", b"", b";a=b")), piece)
    trailers = chance.choice((b"", b"", b"X-Sum: 1\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"Host: y\r\n"))
    return bytes(wire) + b"0\r\n" + trailers + b"\r\n"


def _segments(chance: random.Random, data: bytes) -> list[int]:
    """Offsets where a segment ends: anywhere, where proxies flush, and around blank lines."""
    ends = {chance.randrange(1, len(data)) for _ in range(chance.choice((0, 1, 2, 5)))}
    ends |= {at for at in FLUSH if at < len(data) and chance.random() < 0.5}
    at = data.find(b"\r\n\r\n")
    while at >= 0 and len(ends) < 40:
        if chance.random() < 0.5:
            ends.add(at + chance.randrange(6))
        at = data.find(b"\r\n\r\n", at + 1)
    return sorted(end for end in ends if 0 < end < len(data))


async def talk(url: str, said: Conversation) -> list[tuple[int, bytes]]:
    """Say it; status and body of each answer until there are as many as are waited for, or the bridge hangs up."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        async with asyncio.timeout(PATIENCE):
            saying = asyncio.ensure_future(_say(writer, said))
            try:
                found = await _answers(reader, said)
                if said.heard < len(said.expected):
                    await asyncio.sleep(0.003)  # logs what no caller waits for
                return found
            finally:
                saying.cancel()
                await asyncio.gather(saying, return_exceptions=True)
    finally:
        writer.transport.abort()


async def _say(writer: asyncio.StreamWriter, said: Conversation) -> None:
    at = 0
    for end in (*said.ends, len(said.data)):
        writer.write(said.data[at:end])
        await writer.drain()
        await asyncio.sleep(0.003 if end in said.paused else 0)
        at = end


async def _answers(reader: asyncio.StreamReader, said: Conversation) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while len(found) < said.heard:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            status = int(first.split(" ")[1])
            if status < 200:
                continue
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            found.append((status, await reader.readexactly(int(headers["content-length"]))))
        except (asyncio.IncompleteReadError, ConnectionError):
            break
    return found


def compare(said: Conversation, answers: list[tuple[int, bytes]]) -> list[str]:
    """What is not as it must be."""
    faults = []
    for number, one in enumerate(said.expected[: said.heard]):
        if number >= len(answers):
            if one.kind != "last":
                faults.append(f"{said.name}: no answer to request {number}, a {one.kind}")
            break
        status, body = answers[number]
        if wrong := _wrong(one, status, body):
            faults.append(f"{said.name}: request {number}, a {one.kind}, was answered {status} {wrong}")
    return faults


def _wrong(one: Expected, status: int, body: bytes) -> str:
    """Why this is not the answer, or an empty string."""
    if one.kind == "last":
        return "" if 400 <= status < 500 else "although it is not HTTP"
    shown = body[:200].decode("utf-8", "replace")
    if status != 200:
        return shown
    answer = json.loads(body)
    if one.kind == "validate":
        came, sent = answer["content"]["body"], one.body.decode()
    elif one.kind == "pass":
        came, sent = answer["sha256"], sum_of(one.body)
    elif one.kind in ("upload", "media"):
        came, sent = answer["content_uri"].rpartition("/")[2], sum_of(one.body)
    else:
        came = sent = ""
    return "" if came == sent else f"{shown!r}, which is not what was sent"


async def fuzz(
    url: str,
    callers: list[Caller],
    seed: int,
    until: Callable[[], Awaitable[None]],
    accepted: Callable[[Caller, int, str], None] = lambda _caller, _n, _event: None,
) -> Found:
    """Talk to a bridge, each caller by itself, until `until` returns. `accepted` is called with each event's id."""
    found, stopping = Found(), asyncio.Event()

    async def speak(caller: Caller) -> None:
        n = number = 0
        while not stopping.is_set():
            said = converse(f"{seed}:{caller.name}:{number}", caller, n)
            number += 1
            try:
                answers = await talk(url, said)
            except (OSError, TimeoutError) as error:
                found.faults.append(f"{said.name}: {type(error).__name__} {error}")
                answers = []
            else:
                found.faults += compare(said, answers)
            found.conversations += 1
            found.requests += len(said.expected)
            for one, (status, body) in zip(said.expected, answers, strict=False):
                found.kinds[one.kind] += 1
                if one.kind == "send" and status == 200:
                    accepted(caller, one.n, json.loads(body)["event_id"])
            n += sum(one.kind == "send" for one in said.expected)

    async with asyncio.TaskGroup() as group:
        for caller in callers:
            group.create_task(speak(caller))
        await until()
        stopping.set()
    return found
