"""Sends that were answered with a 4xx, on their way to the delivery log: who, when, where, why; nothing of the body.

A body may hold secrets, and who reads the log need not be who sent it. Noting a call is a step in memory: no answer
waits for the store, and what it does not take is not kept. Calls that are refused alike, as those of a flow that
repeats a wrong payload, are one entry with a number.
"""

import asyncio
import contextlib
import secrets
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from urllib.parse import unquote

from flowbridge import metrics
from flowbridge.errors import MatrixError
from flowbridge.limits import peer
from flowbridge.store import Database, StoreFull, StoreUnavailable, clock, refused
from flowbridge.store.json_columns import to_json

ALIKE_MS = 600_000  # calls alike within this time, counted from the first, are one entry
MAX_OPEN = 2_000  # entries in memory
MAX_NEW = 20  # of one caller between two writes, or of all who are not known; what else it sends is one more entry
MAX_TEXT = 255  # characters of a room and a type, as Matrix has them
MAX_ERROR = 500
PREFIX = "refused-"  # of the ids

_OTHERS = "more of this caller's calls were refused than are listed one by one"

Alike = tuple[str, ...]


@dataclass(slots=True)
class _Entry:
    row: dict[str, Any]
    unwritten: int = 1  # calls
    is_new: bool = True  # no row of it has been written


class RefusedCalls:
    """For one event loop. `seals`: what callers are told is encrypted in the store."""

    def __init__(
        self,
        database: Database,
        *,
        kept: refused.Kept | None = None,
        max_open: int = MAX_OPEN,
        max_new: int = MAX_NEW,
        seals: bool = False,
    ) -> None:
        self._database = database
        self._seals = seals
        self._kept = kept or refused.Kept()
        self._max_open = max_open
        self._max_new = max_new
        self._open: dict[Alike, _Entry] = {}  # by what makes calls alike; the oldest first
        self._new = Counter[str]()  # entries of each caller that are not written
        self._changed = False
        self._writing = asyncio.Lock()
        prefix = secrets.token_urlsafe(9)
        self._ids = (f"{PREFIX}{prefix}{number:x}" for number in count(1))

    def note(self, room: str, event_type: str, error: MatrixError) -> None:
        """The call of the current task was answered with this error. `room`, `event_type`: segments of its path."""
        caller = "" if peer.is_guest() else peer.who()
        address, sentence = peer.address(), error.error[:MAX_ERROR]
        # An address that is not known makes one entry for each kind of refusal, whatever it asks for.
        where = (address,) if not caller else (room, event_type, sentence)
        alike = (caller, str(error.status), str(error.errcode), *where)
        now = clock.now_ms()
        entry = self._open.get(alike)
        if entry is None or now - entry.row["refused_at"] > ALIKE_MS:
            if self._new[caller] >= self._max_new:
                alike, room, event_type, sentence = (caller,), "", "", _OTHERS
                entry = self._open.get(alike)
            if entry is None or now - entry.row["refused_at"] > ALIKE_MS:
                if not self._make_room():
                    return
                told = {"status": error.status, "errcode": str(error.errcode), "error": _text(sentence, MAX_ERROR)}
                self._open.pop(alike, None)
                self._open[alike] = _Entry(
                    {
                        "delivery": next(self._ids),
                        "caller": caller,
                        "user_id": caller if caller.startswith("@") else None,
                        "api_key": caller.removeprefix("key ") if caller.startswith("key ") else None,
                        "address": address,
                        "room_id": _text(unquote(room), MAX_TEXT),
                        "event_type": _text(unquote(event_type), MAX_TEXT),
                        "error": to_json(told),
                        "refused_at": now,
                        "last_at": now,
                    }
                )
                self._new[caller] += 1
                self._changed = True
                return
        entry.unwritten += 1
        entry.row["last_at"] = now
        self._changed = True

    def _make_room(self) -> bool:
        """Whether there is room for one more entry; one that is written need not stay."""
        if len(self._open) < self._max_open:
            return True
        alike = next((alike for alike, entry in self._open.items() if not entry.unwritten), None)
        if alike is None:
            metrics.refused_unlisted.inc()
            return False
        del self._open[alike]
        return True

    def _kept_row(self, entry: _Entry) -> dict[str, Any]:
        """As the store has it: what the caller was told may quote what it wanted to send."""
        row = entry.row
        if not self._seals:
            return row
        return {**row, "error": self._database.contents.seal(row["error"], row["delivery"])}

    async def flush(self) -> None:
        """Write what was noted so far, with the next commit. What the store does not take now is tried again."""
        if self._database.trouble or self._database.missing:
            return
        async with self._writing:  # also for who finds nothing new: what is being written should be there
            if not self._changed:
                return
            self._changed = False
            taken = [(entry, entry.unwritten, entry.is_new) for entry in self._open.values() if entry.unwritten]
            new = [{**self._kept_row(entry), "number": number} for entry, number, is_new in taken if is_new]
            again = [
                {"b_delivery": entry.row["delivery"], "b_number": number, "b_last_at": entry.row["last_at"]}
                for entry, number, is_new in taken
                if not is_new
            ]
            self._new.clear()
            try:
                await self._database.run(
                    partial(refused.write, new=new, again=again, kept=self._kept), lingers=True, alone=True
                )
            except (StoreFull, StoreUnavailable):
                self._changed = True
                self._new.update(entry.row["caller"] for entry, _, is_new in taken if is_new)
                return
            for entry, number, _ in taken:
                entry.unwritten -= number
                entry.is_new = False
            self._forget()

    def _forget(self) -> None:
        old = clock.now_ms() - ALIKE_MS
        for alike in [alike for alike, entry in self._open.items() if entry.row["refused_at"] < old]:
            with contextlib.suppress(KeyError):
                if not self._open[alike].unwritten:
                    del self._open[alike]


def _text(text: str, limit: int) -> str:
    """What both engines take as a text."""
    return text[:limit].encode("utf-8", "replace").decode().replace("\0", "\ufffd")
