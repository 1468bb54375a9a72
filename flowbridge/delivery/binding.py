"""Late binding: an event whose target had no event id when it was accepted gets its relations when its turn comes.

Its target is in the same lane, and before it, so it has been sent by then, or is dead. The content with its relations
is in the store before it is sent: what is tried again, or looked for, is the same event.

So is decided what an event is to its story (events/stories.py). The decision is one commit with what it leaves behind:
it is made once, whatever becomes of the process. For a replay it is made once more, since others may have been told
meanwhile.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sqlalchemy import Connection

from flowbridge.events import canonical_json, relations
from flowbridge.events.relations import Binding, Content, Find, Found, Target
from flowbridge.events.stories import Chapter, Said, Story, decide, quiet
from flowbridge.store import Fence, Row, clock, leases, message_keys, outbox
from flowbridge.store.json_columns import from_json, to_json

Amended = Callable[[dict[str, Any]], dict[str, Any]]  # a row of the outbox, with an outcome that is not written yet


@dataclass(frozen=True, slots=True)
class Resolved:
    """What became of a binding: columns of the row. `missing`: why the event is pointless, and its row as it was.

    `said`: the event that says it already; then the row is as it was, but for the history.
    """

    content: bytes
    history: list[dict[str, Any]]
    binding: str | None = None
    missing: str = ""
    said: str = ""


class _TooEarly(Exception):
    """An event before it is yet to end."""


def is_due(row: Row) -> bool:
    """Whether an event is yet to get its relations; that of a story gets them once more when it is replayed."""
    return row.binding is not None and Binding.from_json(row.binding).bound_as != row.txn_id


def resolve(connection: Connection, rows: Sequence[Row], fence: Fence, amended: Amended) -> list[Resolved] | None:
    """Write contents with their relations, and what keys stand for now; None: the lane has another holder.

    Of the first row, whose turn it is, and with it of those behind it, up to the first one that needs to know how
    another one ends: a commit for each would hold up a lane.
    """
    if not leases.is_held(connection, fence):
        return None
    return list(_resolved(connection, rows, amended))


def _resolved(connection: Connection, rows: Sequence[Row], amended: Amended) -> Iterator[Resolved]:
    for number, row in enumerate(rows):
        try:
            yield _Resolving(connection, row, amended, is_ahead=number > 0).run()
        except _TooEarly:
            return


class _Resolving:
    """One event. `is_ahead`: it is not its turn yet: nothing is written before an event that this depends on ends."""

    def __init__(self, connection: Connection, row: Row, amended: Amended, *, is_ahead: bool) -> None:
        self._connection = connection
        self._row = row
        self._amended = amended
        self._is_ahead = is_ahead
        self._binding = Binding.from_json(row.binding or "{}")
        self._key = (row.api_key or row.account, row.room_id, self._binding.key)
        self._now = clock.now_ms()
        self._find = cache(self._found)
        self._row_of = cache(self._looked_up)

    def run(self) -> Resolved:
        chapter = self._binding.chapter
        return self._tell(chapter) if chapter is not None and self._binding.key else self._relate()

    def _relate(self) -> Resolved:
        """A message that is of no story."""
        binding = self._binding
        resolved = self._bind(json.loads(self._row.content), binding, self._find)
        if binding.key and not resolved.missing:
            if binding.on_update == "new" or isinstance(self._find(Target("key", binding.key)), str):
                message_keys.assign(self._connection, *self._key, self._row.delivery, self._now)
            else:
                message_keys.touch(self._connection, *self._key, self._now)
        return resolved

    def _tell(self, chapter: Chapter) -> Resolved:
        """A chapter of a story."""
        binding, row, told = self._binding, self._row, self._told()
        last = told.story.last if told else None
        chapter = chapter.heard(row.accepted_at)
        is_overtaken = bool(binding.bound_as) and last is not None and last.by != binding.after
        decision, why = decide(chapter, last.chapter if last else None, overtaken=is_overtaken)
        if told is not None and decision == "nothing":
            if self._is_ahead:
                raise _TooEarly  # it is settled in its turn
            self._remember(told, told.story.confirmed(chapter))
            return Resolved(row.content, self._history(why), row.binding, said=self._says(told))
        content = json.loads(row.content)
        if binding.bound_as:
            content = relations.unbound(content)
        bound = replace(binding, bound_as=row.txn_id, after=last.by if last else "")
        said = Said(chapter, row.delivery)
        if told is not None and decision == "update":
            content = {**content, "m.mentions": {}} if binding.on_update == "edit" else quiet(content)
            self._remember(told, Story(said, last))
            return self._bind(content, binding, self._finding(told.message), bound)
        if decision == "notice":
            content = quiet(content)
        story = Story(said, last, (told.delivery, told.message.event_id) if told else None)
        message_keys.assign(self._connection, *self._key, row.delivery, self._now, story=story.to_json())
        return self._bind(content, replace(binding, key=""), self._find, bound)

    def _bind(self, content: Content, binding: Binding, find: Find, keeps: Binding | None = None) -> Resolved:
        bound = relations.bind(content, binding, find)
        history = self._history(*bound.notes)
        if bound.missing:
            if self._is_ahead:
                raise _TooEarly
            return Resolved(self._row.content, history, missing=bound.missing)
        written, kept = canonical_json.write(bound.content), keeps.to_json() if keeps else None
        outbox.bind(self._connection, self._row.delivery, written, to_json(history), kept)
        return Resolved(written, history, kept)

    def _history(self, *notes: str) -> list[dict[str, Any]]:
        return [*from_json(self._row.history), *({"at": self._now, "note": note} for note in notes)]

    # stories

    def _told(self) -> "_Told | None":
        """The story so far; None if nothing of it is in the room."""
        known = message_keys.read(self._connection, *self._key)
        if known is None:
            return None
        message = self._sent(known.delivery, known.event_id)
        if known.story is None:  # a message of no story has the key
            return _Told(Story(Said(Chapter(), known.delivery)), known.delivery, message) if message else None
        story, delivery = Story.from_json(known.story), known.delivery
        if not self._is_said(story.last.by, delivery, message):
            if story.last.by == delivery:
                delivery, event_id = story.was or ("", "")
                message = self._sent(delivery, event_id) if event_id else None
            if story.before is None:
                return None
            story = Story(story.before)
        elif story.last.by != delivery and self._row_of(story.last.by) is None:
            # Deleted, and how it ended is not known: said once more it does no harm, not said at all it might.
            story = replace(story, last=replace(story.last, chapter=replace(story.last.chapter, digest="")))
        return _Told(story, delivery, message) if message else None

    def _is_said(self, by: str, delivery: str, message: Found | None) -> bool:
        """Whether what was said last is in the room. `message`: of the delivery that the key stands for."""
        if by == self._row.delivery:  # it is replayed
            return False
        if by == delivery:
            return message is not None
        row = self._row_of(by)
        return row is None or row["state"] == "sent"

    def _says(self, told: "_Told") -> str:
        """The event that shows what was said last."""
        row = self._row_of(told.story.last.by)
        found = _event(row) if row is not None else None
        return (found or told.message).original

    def _remember(self, told: "_Told", story: Story) -> None:
        event_id = told.message.event_id  # the key may have stood for a message that died
        message_keys.assign(
            self._connection, *self._key, told.delivery, self._now, event_id=event_id, story=story.to_json()
        )

    def _finding(self, message: Found) -> Find:
        key = Target("key", self._binding.key)
        return lambda target: message if target == key else self._find(target)

    # look-ups

    def _found(self, target: Target) -> Found | str:
        if target.kind == "event":
            return Found(target.name)
        if target.kind == "delivery":
            return self._sent(target.name, None) or f"{target} was not sent"
        owner, room_id, _ = self._key
        known = message_keys.read(self._connection, owner, room_id, target.name)
        if known is None:
            return f"{target} is not known"
        return self._sent(known.delivery, known.event_id) or f"{target} was not sent"

    def _sent(self, delivery: str, kept: str | None) -> Found | None:
        """The event that a delivery became. `kept`: its id, where its row may be deleted."""
        row = self._row_of(delivery)
        if row is not None and (found := _event(row)) is not None:
            return found
        kept = kept or message_keys.of_delivery(self._connection, delivery)
        return Found(kept) if kept else None

    def _looked_up(self, delivery: str) -> dict[str, Any] | None:
        row = outbox.by_delivery(self._connection, [delivery]).get(delivery)
        row = self._amended(row) if row is not None else None
        if self._is_ahead and row is not None and row["state"] == "queued":
            raise _TooEarly
        return row


@dataclass(frozen=True, slots=True)
class _Told:
    """A story, and the message that its key stands for."""

    story: Story
    delivery: str
    message: Found


def _event(row: dict[str, Any]) -> Found | None:
    """The event of a row. Its content may be blanked."""
    if row["state"] != "sent" or not row["event_id"]:
        return None
    return Found(row["event_id"], json.loads(row["content"]) if row["content"] else None)
