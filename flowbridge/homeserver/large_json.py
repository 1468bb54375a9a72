"""Large JSON, read and written without holding up the event loop.

A thread alone is no help: `json` reads a text in one go and holds the interpreter for as long as that takes, half a
second for all rooms of a busy account. Here the outer levels are walked in Python, so that the loop has its turn
between two events.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter

P = ParamSpec("P")
T = TypeVar("T")

LARGE_BYTES = 128 * 1024  # 1 ms of reading; larger texts are worked on outside the event loop
LEVELS = 6  # of a sync: itself, rooms, kind, room, section, the list of events

_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, Limiter] = WeakKeyDictionary()
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="flowbridge-bulk")  # one: several would share the same processor


async def aside(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do this work; outside the event loop when it is about LARGE_BYTES or more."""
    if size < LARGE_BYTES:
        return work(*args, **kwargs)
    loop = asyncio.get_running_loop()
    turns = _TURNS.setdefault(loop, Limiter("large answers that are being read", 1, 1))
    async with turns.turn(peer.who()):  # callers take turns, however much each of them wants
        return await loop.run_in_executor(_THREAD, partial(work, *args, **kwargs))


def read(body: bytes, levels: int = LEVELS) -> Any:
    """The value of a JSON text; of a large one the outer levels are walked. Raises ValueError or RecursionError."""
    text = body.decode()
    if len(body) < LARGE_BYTES:
        return _DECODER.decode(text)
    value, end = _value(text, _skip(text, 0), levels)
    if _skip(text, end) != len(text):
        raise ValueError("there is more behind the JSON value")
    return value


def write(value: Any, levels: int = 2) -> bytes:
    """JSON as flowbridge answers it; a lone surrogate becomes a question mark.

    `levels`: how many are walked. With 2, of an object with lists of events, each event is written in one go.
    """
    return "".join(_pieces(value, levels)).encode("utf-8", "replace")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_BLANK = re.compile(r"[ \t\n\r]*")


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _value(text: str, at: int, levels: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    match text[at : at + 1] if levels else "":
        case "{":
            found: dict[str, Any] = {}
            for key_at in (places := _Places(text, at, "}")):
                key, end = _DECODER.raw_decode(text, key_at)
                colon = _skip(text, end)
                if not isinstance(key, str) or text[colon : colon + 1] != ":":
                    raise ValueError(f"no key and colon at character {key_at}")
                found[key], places.at = _value(text, _skip(text, colon + 1), levels - 1)
            return found, places.at
        case "[":
            items = []
            for item_at in (places := _Places(text, at, "]")):
                item, places.at = _value(text, item_at, levels - 1)
                items.append(item)
            return items, places.at
    return _DECODER.raw_decode(text, at)


class _Places:
    """Where the items of an object or a list begin. The reader of an item moves `at` to its end."""

    def __init__(self, text: str, at: int, closing: str) -> None:
        self.at = at + 1
        self._text = text
        self._closing = closing

    def __iter__(self) -> Iterator[int]:
        self.at = _skip(self._text, self.at)
        if self._next() == self._closing:
            self.at += 1
            return
        while True:
            yield self.at
            self.at = _skip(self._text, self.at)
            mark = self._next()
            if mark == self._closing:
                self.at += 1
                return
            if mark != ",":
                raise ValueError(f"no comma at character {self.at}")
            self.at = _skip(self._text, self.at + 1)

    def _next(self) -> str:
        return self._text[self.at : self.at + 1]


def _pieces(value: Any, levels: int) -> Iterator[str]:
    if levels and isinstance(value, dict) and value:
        mark = "{"
        for key, item in value.items():
            yield f"{mark}{_ENCODER.encode(key)}:"
            yield from _pieces(item, levels - 1)
            mark = ","
        yield "}"
    elif levels and isinstance(value, list) and value:
        mark = "["
        for item in value:
            yield mark
            yield from _pieces(item, levels - 1)
            mark = ","
        yield "]"
    else:
        yield _ENCODER.encode(value)
