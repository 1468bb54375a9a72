"""Late binding: an event whose target had no event id when it was accepted gets its relations when its turn comes.

Its target is in the same lane, and before it, so it has been sent by then, or is dead. The content with its relations
is in the store before it is sent: what is tried again, or looked for, is the same event.

So is decided what an event is to its story (events/stories.py). The decision is one commit with what it leaves behind:
it is made once, whatever becomes of the process. For a replay it is made once more, since others may have been told
meanwhile.

Most events are bound when they are inserted (`resolve_inserted`): that saves a commit, and a change of threads. It is
the same decision from the same facts, which are in the store and in outcomes on their way to it:
- Only on SQLite: no other process sends for its lanes, and one thread writes all decisions, one after the other.
- All that is queued before it in its lane is bound, or is bound first in this transaction. That is asked of the store,
  not of the lane, which may be reading it, or not know what a command has added. An event whose decision has to wait
  for another one's end lets those behind it wait, too.
- Nothing is decided by how an event will end that has not ended: it is bound as one ahead of its turn is.
- It is one transaction with the insertion. If that is lost, so is the decision; if the process dies, the event is bound
  or due like any other, and one that says nothing new is decided once more.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from flowbridge.events import canonical_json, relations
from flowbridge.events.relations import Binding, Content, Find, Found, Target
from flowbridge.events.stories import SAID, Chapter, Said, Story, decide, quiet
from flowbridge.store import Fence, Row, clock, contents, leases, message_keys, outbox
from flowbridge.store.json_columns import from_json, to_json
from flowbridge.store.message_keys import Key, Known

Amended = Callable[[dict[str, Any]], dict[str, Any]]  # a row of the outbox, with an outcome that is not written yet


@dataclass(frozen=True, slots=True)
class Wanted:
    """Events of a lane, in their order, the first of which has its turn."""

    rows: Sequence[Row]
    fence: Fence


@dataclass(frozen=True, slots=True)
class Resolved:
    """What became of a binding: columns of the row. `missing`: why the event is pointless, and its row as it was.

    `said`: the event that says it already; then the row is as it was, too, but for the history.
    """

    content: bytes
    history: list[dict[str, Any]]
    binding: str | None = None
    missing: str = ""
    said: str = ""


class _TooEarly(Exception):
    """An event that this one depends on is yet to end."""


def is_due(row: Row) -> bool:
    """Whether an event is yet to get its relations; that of a story gets them once more when it is replayed."""
    return row.binding is not None and not relations.is_bound(row.binding, row.txn_id)


def resolve(connection: Connection, wanted: Sequence[Wanted], amended: Amended) -> list[list[Resolved] | None]:
    """Write contents with their relations, and what keys stand for now; None for a lane that has another holder.

    Of each lane the first event, and with it those behind it, up to one that has to know how another one ends: a
    commit for each would hold up a lane, and a statement for each all of them.
    """
    if not wanted:
        return []
    held = leases.held(connection, [each.fence for each in wanted])
    mine = [each for each in wanted if each.fence in held]
    resolving = _Resolving(connection, [row for each in mine for row in each.rows], amended)
    found = [resolving.lane(each.rows) if each.fence in held else None for each in wanted]
    resolving.write()
    return found


def resolve_inserted(connection: Connection, inserted: Sequence[Row], amended: Amended) -> dict[str, Resolved]:
    """As `resolve`, for events that were inserted in this transaction, in their order; those that can be bound."""
    mine, found, waiting = {row.delivery for row in inserted}, dict[str, Resolved](), set[str]()
    for other in outbox.unbound(connection, {row.lane for row in inserted}):
        if other["delivery"] not in mine and amended(other)["state"] == "queued":
            waiting.add(other["lane"])
    resolving = _Resolving(connection, [row for row in inserted if row.lane not in waiting], amended)
    for row in inserted:
        if row.lane in waiting:
            continue
        if (resolved := resolving.ahead(row)) is None:
            waiting.add(row.lane)
        else:
            found[row.delivery] = resolved
    resolving.write()
    return found


class _Resolving:
    """Events of several lanes: what they refer to is read at once, and what becomes of them is written at once."""

    def __init__(self, connection: Connection, rows: Sequence[Row], amended: Amended) -> None:
        self._connection = connection
        self._now = clock.now_ms()
        self._bindings = {row.delivery: Binding.from_json(row.binding or "{}") for row in rows}
        self._keys = message_keys.read(connection, set(self._named(rows)))
        self._stories = {key: Story.from_json(known.story) for key, known in self._keys.items() if known.story}
        ended = outbox.ended(connection, list(self._deliveries()))
        self._ended = {delivery: amended(row) for delivery, row in ended.items()}
        self._changed: dict[Key, Known] = {}
        self._bound: list[dict[str, Any]] = []

    def lane(self, rows: Sequence[Row]) -> list[Resolved]:
        found: list[Resolved] = []
        for row in rows:
            try:
                found.append(self._event(row, is_ahead=bool(found)).resolved())
            except _TooEarly:
                break
        return found

    def ahead(self, row: Row) -> Resolved | None:
        """What becomes of an event before its turn; None if that is not known yet."""
        try:
            return self._event(row, is_ahead=True).resolved()
        except _TooEarly:
            return None

    def _event(self, row: Row, *, is_ahead: bool) -> "_Event":
        return _Event(self, row, self._bindings[row.delivery], is_ahead=is_ahead)

    def write(self) -> None:
        message_keys.write(self._connection, self._changed, self._now)
        outbox.bind(self._connection, self._bound)

    def _named(self, rows: Sequence[Row]) -> Iterable[Key]:
        for row in rows:
            binding, owner = self._bindings[row.delivery], row.api_key or row.account
            names = [target.name for target in binding.targets().values() if target.kind == "key"]
            yield from ((owner, row.room_id, name) for name in (*names, binding.key) if name)

    def _deliveries(self) -> Iterable[str]:
        found = {known.delivery for known in self._keys.values()}
        for story in self._stories.values():
            found.add(story.last.by)
            if story.before is not None:  # it holds again if the last one died
                found.add(story.before.by)
            if story.was is not None:
                found.add(story.was[0])
        for binding in self._bindings.values():
            found.update(target.name for target in binding.targets().values() if target.kind == "delivery")
        return found

    # for one event

    def known(self, key: Key) -> tuple[Known, Story | None] | None:
        known = self._changed.get(key) or self._keys.get(key)
        return (known, self._stories.get(key)) if known else None

    def assign(self, key: Key, delivery: str, event_id: str | None = None, story: Story | None = None) -> None:
        """Let a key stand for this delivery from now on."""
        self._changed[key] = Known(delivery, event_id, story.to_json() if story else None)
        if story is not None:
            self._stories[key] = story
        else:
            self._stories.pop(key, None)

    def bind(self, row: Row, content: bytes, history: list[dict[str, Any]], binding: str | None) -> None:
        text = content.decode()
        if row.is_sealed:
            text = contents.of(self._connection).seal(text, row.delivery)
        values = {"content": text, "history": to_json(history), "binding": binding}
        self._bound.append({"delivery": row.delivery, **values})

    def is_open(self, delivery: str) -> bool:
        """Whether it is yet to end."""
        row = self._ended.get(delivery)
        return row["state"] == "queued" if row is not None else delivery in self._bindings

    def row(self, delivery: str) -> dict[str, Any] | None:
        return self._ended.get(delivery)

    def kept_id(self, delivery: str) -> str | None:
        """The event id of a deleted delivery."""
        return message_keys.of_delivery(self._connection, delivery)

    def note(self, text: str) -> dict[str, Any]:
        return {"at": self._now, "note": text}


class _Event:
    """`is_ahead`: it is not its turn yet: nothing becomes of it before an event that it depends on has ended."""

    def __init__(self, all_: _Resolving, row: Row, binding: Binding, *, is_ahead: bool) -> None:
        self._all = all_
        self._row = row
        self._is_ahead = is_ahead
        self._binding = binding
        self._key = (row.api_key or row.account, row.room_id, binding.key)

    def resolved(self) -> Resolved:
        chapter = self._binding.chapter
        return self._told(chapter) if chapter is not None and self._binding.key else self._related()

    def _related(self) -> Resolved:
        """A message that is of no story."""
        binding = self._binding
        resolved = self._bind(json.loads(self._row.content), binding, self._find)
        if binding.key and not resolved.missing:
            known = self._all.known(self._key)
            if known is None or binding.on_update == "new" or isinstance(self._find(Target("key", binding.key)), str):
                self._all.assign(self._key, self._row.delivery)
            else:
                self._all.assign(self._key, known[0].delivery, known[0].event_id)
        return resolved

    def _told(self, chapter: Chapter) -> Resolved:
        """A chapter of a story."""
        binding, row, so_far = self._binding, self._row, self._so_far()
        last = so_far.story.last if so_far else None
        chapter = chapter.heard(row.accepted_at)
        events = self._events()
        number = binding.number if binding.bound_as else events + 1
        is_overtaken = last is not None and last.number > number
        decision, why = decide(chapter, last.chapter if last else None, overtaken=is_overtaken)
        if so_far is not None and self._is_followed():
            return Resolved(row.content, self._history(SAID), row.binding, said=self._says(so_far))
        if so_far is not None and decision == "nothing":
            self._remember(so_far, so_far.story.confirmed(chapter, number))
            return Resolved(row.content, self._history(why), row.binding, said=self._says(so_far))
        bound, said = binding.bound(row.txn_id, number), Said(chapter, row.delivery, number)
        if so_far is None and decision == "new" and not (binding.bound_as or binding.targets()):
            self._all.assign(self._key, row.delivery, story=Story(said, events=max(events, number)))
            return self._written(row.content, self._history(), bound)  # most of them: nothing changes
        content = json.loads(row.content)
        if binding.bound_as:
            content = relations.unbound(content)
        if so_far is not None and decision == "update":
            if binding.on_update == "edit":
                content = {**content, "m.mentions": {}}
            elif chapter.state or not content.get("m.mentions"):  # else its template mentions somebody, as it may
                content = quiet(content)
            resolved = self._bind(content, binding, self._finding(so_far.message), bound)
            self._remember(so_far, Story(said, last, events=max(events, number)))
            return resolved
        if decision == "notice":
            content = quiet(content)
        was = (so_far.delivery, so_far.message.event_id) if so_far else None
        resolved = self._bind(content, replace(binding, key=""), self._find, bound)
        self._all.assign(self._key, row.delivery, story=Story(said, last, was, max(events, number)))
        return resolved

    def _bind(self, content: Content, binding: Binding, find: Find, keeps: Binding | None = None) -> Resolved:
        bound = relations.bind(content, binding, find)
        history = self._history(*bound.notes)
        if bound.missing:
            if self._is_ahead:
                raise _TooEarly
            return Resolved(self._row.content, history, missing=bound.missing)
        return self._written(canonical_json.write(bound.content), history, keeps)

    def _written(self, written: bytes, history: list[dict[str, Any]], keeps: Binding | None) -> Resolved:
        kept = keeps.to_json() if keeps else None
        self._all.bind(self._row, written, history, kept)
        return Resolved(written, history, kept)

    def _history(self, *notes: str) -> list[dict[str, Any]]:
        return [*from_json(self._row.history), *map(self._all.note, notes)]

    # stories

    def _events(self) -> int:
        """How many events the story has had."""
        found = self._all.known(self._key)
        return found[1].events if found and found[1] else 0

    def _so_far(self) -> "_SoFar | None":
        """The story before this event; None if nothing of it is in the room."""
        found = self._all.known(self._key)
        if found is None:
            return None
        (delivery, event_id, _), story = found
        message = self._sent(delivery, event_id)
        if story is None:  # a message of no story has the key
            return _SoFar(Story(Said(Chapter(), delivery)), delivery, message) if message else None
        if not self._is_said(story.last.by, delivery, message):
            if story.last.by == delivery:
                delivery, event_id = story.was or ("", "")
                message = self._sent(delivery, event_id) if event_id else None
            if story.before is None:
                return None
            story = Story(story.before, events=story.events)
        elif story.last.by != delivery and self._row_of(story.last.by) is None:
            # Deleted, and how it ended is not known: said once more it does no harm, not said at all it might.
            story = replace(story, last=replace(story.last, chapter=replace(story.last.chapter, digest="")))
        return _SoFar(story, delivery, message) if message else None

    def _is_followed(self) -> bool:
        """Whether one behind this event is bound, and waits for its own turn.

        They were bound in one commit, in which this one said nothing new; the process ended before it was settled. To
        decide once more would be to forget the one behind it, which goes out as it was bound.
        """
        found = self._all.known(self._key)
        last = found[1].last.by if found and found[1] else ""
        row = self._row_of(last) if last and last != self._row.delivery else None
        if row is None or row["state"] != "queued" or not row["binding"]:
            return False
        return bool(Binding.from_json(row["binding"]).bound_as == row["txn_id"])

    def _is_said(self, by: str, delivery: str, message: Found | None) -> bool:
        """Whether what was said last is in the room. `message`: of the delivery that the key stands for."""
        if by == self._row.delivery:  # it is replayed
            return False
        if by == delivery:
            return message is not None
        row = self._row_of(by)
        return row is None or row["state"] == "sent"

    def _says(self, so_far: "_SoFar") -> str:
        """The event that shows what was said last."""
        row = self._row_of(so_far.story.last.by)
        found = _event(row) if row is not None else None
        return (found or so_far.message).original

    def _remember(self, so_far: "_SoFar", story: Story) -> None:
        """The key may have stood for a message that died."""
        self._all.assign(self._key, so_far.delivery, so_far.message.event_id, story)

    def _finding(self, message: Found) -> Find:
        key = Target("key", self._binding.key)
        return lambda target: message if target == key else self._find(target)

    # look-ups

    def _find(self, target: Target) -> Found | str:
        if target.kind == "event":
            return Found(target.name)
        if target.kind == "delivery":
            return self._sent(target.name, None) or f"{target} was not sent"
        owner, room_id, _ = self._key
        found = self._all.known((owner, room_id, target.name))
        if found is None:
            return f"{target} is not known"
        return self._sent(found[0].delivery, found[0].event_id) or f"{target} was not sent"

    def _sent(self, delivery: str, kept: str | None) -> Found | None:
        """The event that a delivery became. `kept`: its id, where its row may be deleted."""
        row = self._row_of(delivery)
        if row is not None and (found := _event(row)) is not None:
            return found
        kept = kept or self._all.kept_id(delivery)
        return Found(kept) if kept else None

    def _row_of(self, delivery: str) -> dict[str, Any] | None:
        if self._is_ahead and delivery != self._row.delivery and self._all.is_open(delivery):
            raise _TooEarly
        return self._all.row(delivery)


@dataclass(frozen=True, slots=True)
class _SoFar:
    """A story, and the message that its key stands for."""

    story: Story
    delivery: str
    message: Found


def _event(row: dict[str, Any]) -> Found | None:
    """The event of a row. Its content may be blanked, or not to be read."""
    if row["state"] != "sent" or not row["event_id"]:
        return None
    return Found(row["event_id"], json.loads(row["content"]) if contents.is_readable(row["content"]) else None)
