"""Where a listener stands. Pure.

A position is made of the homeserver's own tokens, so that nothing of it has to be remembered here. Between two batches
it is the token of the last one (`until`). Inside the batch that leads from `since` to `until` the rooms go one after
another, sorted by id: all before `room` are done, and none behind it is begun. Of `room`, the events whose marks are in
`done` have been given. Which events lie between two tokens in a room never changes. Their order may, between /sync and
/messages, and does not matter, since the marks name them: a resumed listener gets exactly the rest.
A room with many events is read page by page: then `page` is the homeserver's token of the page, the pages before it are
done, and `done` is about those from it on.
"""

import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from urllib.parse import quote, unquote

from flowbridge.errors import BadRequest

MAX_CHARACTERS = 8_192  # 100 marks are 800; the rest is the homeserver's tokens
MARK = 8  # characters of a mark: 48 bits, to tell a few hundred events of one room apart

_TEXT = re.compile(r"[A-Za-z0-9_.~%-]+(?:,[A-Za-z0-9_.~%-]*){0,4}")
_MARKS = re.compile(rf"(?:[A-Za-z0-9_-]{{{MARK}}})*")


@dataclass(frozen=True, slots=True)
class Position:
    until: str
    since: str = ""
    room: str = ""
    page: str = ""
    done: tuple[str, ...] = ()

    @property
    def between(self) -> bool:
        """Whether it is between two batches."""
        return not self.since

    def __str__(self) -> str:
        """As it stands in `id:` and in `Last-Event-ID`: ASCII, without spaces."""
        until = quote(self.until, safe="")
        if self.between:
            return until
        parts = (quote(part, safe="") for part in (self.since, self.room, self.page))
        return ",".join((until, *parts, "".join(self.done)))


def parse(text: str) -> Position:
    """The position that was given out as this. Raises BadRequest."""
    if len(text) > MAX_CHARACTERS or not _TEXT.fullmatch(text):
        raise _malformed()
    parts = text.split(",")
    if len(parts) not in (1, 5):
        raise _malformed()
    try:
        until, since, room, page = ([unquote(part, errors="strict") for part in parts[:4]] + [""] * 3)[:4]
    except UnicodeDecodeError:
        raise _malformed() from None
    marks = parts[4] if len(parts) == 5 else ""
    if not until.isprintable() or not _MARKS.fullmatch(marks) or (len(parts) == 5 and not since):
        raise _malformed()
    done = tuple(marks[start : start + MARK] for start in range(0, len(marks), MARK))
    return Position(until, since, room, page, done)


@lru_cache(1_024)
def mark(event_id: str) -> str:
    """A short name of an event."""
    return urlsafe_b64encode(blake2b(event_id.encode("utf-8", "replace"), digest_size=MARK * 6 // 8).digest()).decode()


def _malformed() -> BadRequest:
    return BadRequest("Last-Event-ID: this is not an id from this bridge; omit it to begin now")
