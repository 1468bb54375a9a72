"""Texts that are too long for an event are cut: of lists, items are dropped from the end. In the render process.

Sizes are those of canonical JSON, which is what the limit of an event counts.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from itertools import accumulate

from flowbridge.rendering import formats
from flowbridge.rendering.cleaning import TooDeepError

MAX_TEXT = 24_000  # bytes of body and HTML: an event holds 62,000, and an edit holds its text twice
CUT = "… (cut here)"

_TAG = re.compile(r"<[^<>]*>")
_LIST = re.compile(r"<(/?)(li|ul|ol)\b[^<>]*>", re.IGNORECASE)
_HTML = 0.6  # of what fits is HTML, mostly: the others are its text
_FULL = 0.85  # of what fits is enough
_MARGIN = 0.95  # of what should fit by proportion
_TRIES = 4


def text(source: str, limit: int) -> str:
    if size_of(source) <= limit:
        return source
    end = min(len(source), limit)
    for _ in range(_TRIES):
        found = f"{source[:end]}{CUT}"
        if (size := size_of(found)) <= limit:
            return found
        end = int(end * limit / size * _MARGIN)
    return f"{source[: limit // 8]}{CUT}"


def markdown(source: str, limit: int) -> tuple[str, str | None]:
    """What cannot be rendered, for its large tables or its depth, stays as it was written."""
    try:
        return _markdown(source, limit)
    except (formats.RefusedError, TooDeepError):
        return text(source, limit), None


def _markdown(source: str, limit: int) -> tuple[str, str | None]:
    end = min(len(source), limit)
    shown = source if end == len(source) else f"{source[:end]}{CUT}"
    for _ in range(_TRIES):
        body, html = formats.markdown(shown, ())
        if (size := size_of(body) + size_of(html or "")) <= limit:
            return body, html
        end = int(min(end, len(source)) * limit / size * _MARGIN)
        shown = f"{source[:end]}{CUT}"
    return text(source, limit), None


def html(source: str, limit: int) -> tuple[str, str | None]:
    """What is nested too deeply is shown without its tags. Raises RefusedError, TooDeepError for what holds no text."""
    try:
        return _html(source, limit)
    except TooDeepError:
        if shown := " ".join(unescape(_TAG.sub(" ", source[: 8 * limit])).split()):
            return text(shown, limit), None
        raise


def _html(source: str, limit: int) -> tuple[str, str | None]:
    if len(source) <= 2 * limit:
        body, found = formats.html(source, ())
        if _fits(body, found or "", limit):
            return body, found
    items = _items(source)
    kept = _fewer_items(source, items, limit) if items else None
    return kept or _beginning(source, limit)


def _fits(body: str, html: str, limit: int) -> bool:
    """Most are so short that they need not be counted: a character takes 6 bytes at most."""
    return 6 * (len(body) + len(html)) <= limit or size_of(body) + size_of(html) <= limit


def size_of(text: str) -> int:
    """Bytes in canonical JSON."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) - 2


@dataclass(slots=True)
class _Item:
    start: int
    end: int
    list_number: int  # which of the outermost lists it is in


def _items(source: str) -> list[_Item]:
    """Of the outermost lists, in their order; in linear time."""
    found: list[_Item] = []
    depth, lists, start = 0, 0, -1
    for tag in _LIST.finditer(source):
        name, closes = tag[2].lower(), bool(tag[1])
        if name != "li":
            if depth == 1 and closes and start >= 0:  # the end tag of an item may be left out
                found.append(_Item(start, tag.start(), lists))
                start = -1
            depth = max(0, depth + (-1 if closes else 1))
            lists += depth == 1 and not closes
        elif depth == 1:
            if start >= 0:
                found.append(_Item(start, tag.end() if closes else tag.start(), lists))
            start = -1 if closes else tag.start()
    return found


def _fewer_items(source: str, items: Sequence[_Item], limit: int) -> tuple[str, str | None] | None:
    """With as many items as fit; None where not even one does."""
    ends = list(accumulate(item.end - item.start for item in items))
    others = len(source) - ends[-1]
    best: tuple[str, str | None] | None = None
    room = _HTML * limit
    low, high = 0, len(items) - 1
    for _ in range(_TRIES):
        count = min(high, max(low + 1, bisect_right(ends, room - others)))
        if count <= low:
            break
        body, found = formats.html(_without(source, items[count:]), ())
        if (size := size_of(body) + size_of(found or "")) > limit:
            high = count - 1
        else:
            low, best = count, (body, found)
            if size > _FULL * limit:
                break
        room = (ends[count - 1] + others) * limit / size * _MARGIN
    return best


def _without(source: str, dropped: Sequence[_Item]) -> str:
    """Each list says how many of its items are not there."""
    counts = Counter(item.list_number for item in dropped)
    pieces, at = [], 0
    for index, item in enumerate(dropped):
        pieces.append(source[at : item.start])
        at = item.end
        if index == 0 or dropped[index - 1].list_number != item.list_number:
            count = counts[item.list_number]
            pieces.append(f"<li>… and {count} more</li>")
    return "".join([*pieces, source[at:]])


def _beginning(source: str, limit: int) -> tuple[str, str | None]:
    """Up to a tag's end; what is open there is closed by the cleaning."""
    end = min(len(source), 2 * limit)
    for _ in range(_TRIES):
        start = source[:end]
        if start.rfind("<") > start.rfind(">"):
            start = start[: start.rfind("<")]
        start = re.sub(r"&[#\w]{0,10}$", "", start)
        # In a table's row it would be moved in front of the table.
        body, found = formats.html(f"{start}</table>{CUT}" if "<table" in start else f"{start}{CUT}", ())
        if (size := size_of(body) + size_of(found or "")) <= limit:
            return body, found
        end = int(end * limit / size * _MARGIN)
    return text(body, limit), None
