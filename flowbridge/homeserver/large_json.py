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
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_BLANK = re.compile(r"[ \t\n\r]*")


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _value(text: str, at: int, levels: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    opening = text[at : at + 1]
    if not levels or opening not in ("{", "["):
        return _DECODER.raw_decode(text, at)
    is_object, closing = opening == "{", "}" if opening == "{" else "]"
    found: dict[str, Any] = {}
    items: list[Any] = []
    at = _skip(text, at + 1)
    if text[at : at + 1] == closing:
        return found if is_object else items, at + 1
    while True:
        if is_object:
            key, at = _key(text, at)
            found[key], at = _value(text, at, levels - 1)
        else:
            item, at = _value(text, at, levels - 1)
            items.append(item)
        at = _skip(text, at)
        mark = text[at : at + 1]
        if mark == closing:
            return found if is_object else items, at + 1
        if mark != ",":
            raise ValueError(f"no comma at character {at}")
        at = _skip(text, at + 1)


def _key(text: str, at: int) -> tuple[str, int]:
    """A key, and where its value begins."""
    key, end = _DECODER.raw_decode(text, at)
    colon = _skip(text, end)
    if not isinstance(key, str) or text[colon : colon + 1] != ":":
        raise ValueError(f"no key and colon at character {at}")
    return key, _skip(text, colon + 1)


def _pieces(value: Any, levels: int) -> Iterator[str]:
    if levels and isinstance(value, dict) and value:
        mark = "{"
        for key, item in value.items():
            yield f"{mark}{ENCODER.encode(key)}:"
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
        yield ENCODER.encode(value)
