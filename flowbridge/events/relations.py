"""What a message refers to: targets as callers name them, and the relations that they become (pure).

A target may be an event that was accepted and is not sent yet. Which event id it has is known when this message's own
turn comes, since both are in one lane. Until then the outbox keeps the content without the relation, and beside it a
*binding*: JSON that says which relation it gets.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from unicodedata import category

from flowbridge.events.stories import Chapter

Content = dict[str, Any]
Kind = Literal["event", "delivery", "key"]

MAX_BYTES = 255  # of an event id, and of a key
# The longest event id there is, where the real one is not known yet: with it, a content is as large as it can become.
LONGEST_ID = "$" + "x" * (MAX_BYTES - 1)

_DELIVERY = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[0-9]{1,3})?")
_JSON = json.JSONEncoder(ensure_ascii=False)
_KEY = "key:"
_NEVER = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, surrogates, ends of lines


@dataclass(frozen=True, slots=True)
class Target:
    """What a caller refers to: an event id, the id of a delivery, or a key of its own."""

    kind: Kind
    name: str

    @classmethod
    def parse(cls, text: str) -> "Target | None":
        """`$…`, `key:NAME` or a delivery id; None for anything else."""
        if text.startswith("$") and len(text) > 1:
            return cls("event", text) if is_name(text) else None
        if text.startswith(_KEY):
            return cls("key", text[len(_KEY) :]) if is_name(text[len(_KEY) :]) else None
        return cls("delivery", text) if _DELIVERY.fullmatch(text) else None

    def __str__(self) -> str:
        return f"{_KEY}{self.name}" if self.kind == "key" else self.name


def is_name(text: str) -> bool:
    """Whether this may be a key, an event id, or a reaction: an emoji is no printable text where it joins several."""
    if not text or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        return False
    return text.isprintable() or not any(category(character) in _NEVER for character in text)


@dataclass(frozen=True, slots=True)
class Found:
    """An event that a target has led to. `content`: what it says, as far as that is known."""

    event_id: str
    content: Mapping[str, Any] | None = None

    def _related(self, rel_type: str) -> str | None:
        relation = (self.content or {}).get("m.relates_to")
        is_it = isinstance(relation, dict) and relation.get("rel_type") == rel_type
        found = relation.get("event_id") if is_it and isinstance(relation, dict) else None
        return found if isinstance(found, str) else None

    @property
    def original(self) -> str:
        """The message itself: an edit of an edit would be shown by no client."""
        return self._related("m.replace") or self.event_id

    @property
    def root(self) -> str:
        """The root of the thread that it is in, or would begin: homeservers refuse threads inside of threads."""
        return self._related("m.thread") or self.original


@dataclass(frozen=True, slots=True)
class Binding:
    """Which relations an event gets. `key`, `on_update`: see `Message`.

    `reacts`, `redacts`: it is nothing without its target; a message is still worth sending without one. `chapter`: the
    key names a story, and this is what the event says of it. Such a binding is kept, for replays: `bound_as` is the
    transaction id under which it was bound, `number` that of the event in its story.
    """

    reply_to: Target | None = None
    thread: Target | None = None
    edit: Target | None = None
    reacts: Target | None = None
    redacts: Target | None = None
    key: str = ""
    on_update: str = "edit"
    chapter: Chapter | None = None
    bound_as: str = ""
    number: int = 0

    def targets(self) -> dict[str, Target]:
        if not (self.reply_to or self.thread or self.edit or self.reacts or self.redacts):
            return {}
        named = {name: getattr(self, name) for name in _TARGETS}
        return {name: target for name, target in named.items() if target is not None}

    def telling(self, chapter: Chapter) -> "Binding":
        """The same, of a message that tells this."""
        return self._with(chapter)

    def bound(self, txn_id: str, number: int) -> "Binding":
        """The same, bound under this transaction id."""
        return self._with(self.chapter, txn_id, number)

    def _with(self, chapter: Chapter | None, bound_as: str = "", number: int = 0) -> "Binding":
        # dataclasses.replace takes 3 µs more, which is for each event of a hook, twice
        targets = (self.reply_to, self.thread, self.edit, self.reacts, self.redacts)
        return Binding(*targets, self.key, self.on_update, chapter, bound_as, number)

    @property
    def is_open(self) -> bool:
        """Whether it is only known later what this refers to."""
        if self is NONE:  # most messages
            return False
        return bool(self.key) or any(target.kind != "event" for target in self.targets().values())

    def to_json(self) -> str:
        found: dict[str, Any] = {"bound_as": self.bound_as, "number": self.number} if self.bound_as else {}
        found |= {name: [target.kind, target.name] for name, target in self.targets().items()}
        if self.key:
            found |= {"key": self.key, "on_update": self.on_update}
        if self.chapter is not None:
            found["chapter"] = self.chapter.to_json()
        return _JSON.encode(found)

    @classmethod
    def from_json(cls, text: str) -> "Binding":
        found: dict[str, Any] = json.loads(text)
        chapter = found.pop("chapter", None)
        named = {name: Target(*value) if name in _TARGETS else value for name, value in found.items()}
        return cls(**named, chapter=Chapter.from_json(chapter) if chapter else None)  # type: ignore[arg-type]


def is_bound(binding: str, txn_id: str) -> bool:
    """Whether this, as JSON, was bound under that transaction id: without reading it, which a lane would do often."""
    return binding.startswith(f'{{"bound_as": {_JSON.encode(txn_id)},')


NONE = Binding()
_TARGETS = ("reply_to", "thread", "edit", "reacts", "redacts")


@dataclass(frozen=True, slots=True)
class Bound:
    """A content with its relations. `notes`: what could not be done as asked; `missing`: the event is pointless."""

    content: Content
    notes: tuple[str, ...] = ()
    missing: str = ""


Find = Callable[[Target], "Found | str"]  # the event; or why there is none, as a clause: "key:x is not known"


def bind(content: Content, binding: Binding, find: Find) -> Bound:
    """Add the relations to a content. What leads to no event is left out, and a note says so."""
    notes: list[str] = []

    def found(name: str, target: Target | None) -> Found | None:
        if target is None:
            return None
        event = find(target)
        if isinstance(event, str):
            notes.append(f"{name}: {event}: sent as a new message")
            return None
        return event

    if binding.reacts is not None or binding.redacts is not None:
        target = binding.reacts or binding.redacts
        assert target is not None
        event = find(target)
        if isinstance(event, str):
            return Bound(content, missing=f"target: {event}")
        if binding.redacts is not None:
            return Bound({**content, "redacts": event.event_id})
        return Bound({"m.relates_to": {**content["m.relates_to"], "event_id": event.original}})
    edit, thread, reply = binding.edit, binding.thread, binding.reply_to
    if binding.key and binding.on_update != "new" and not isinstance(find(Target("key", binding.key)), str):
        target = Target("key", binding.key)  # an update; otherwise it is the first message with this key
        edit = target if binding.on_update == "edit" else None
        thread = target if binding.on_update == "thread" else thread
        reply = target if binding.on_update == "reply" else reply
    if (replaced := found("edit", edit)) is not None:
        return Bound(edited(content, replaced.original), tuple(notes))
    root, answered = found("thread", thread), found("reply_to", reply)
    content = placed(content, root.root if root else None, answered.original if answered else None)
    return Bound(content, tuple(notes))


def edited(content: Content, event_id: str) -> Content:
    """An edit of this event (specification, "Event replacements").

    The outer content is for clients that know no edits. Its `m.mentions` are empty: who is mentioned there would be
    pinged again by each edit.
    """
    outer = {name: value for name, value in content.items() if name != "m.relates_to"}
    new = dict(outer)
    outer["body"] = f"* {outer['body']}"
    if "formatted_body" in outer:
        outer["formatted_body"] = f"* {outer['formatted_body']}"
    return {
        **outer,
        "m.mentions": {},
        "m.new_content": new,
        "m.relates_to": {"rel_type": "m.replace", "event_id": event_id},
    }


def placed(content: Content, root: str | None, answered: str | None) -> Content:
    """In a thread, or as a reply, or both (specification, "Rich replies" and "Threading").

    A reply quotes nothing since version 1.13. In a thread that is no reply, `m.in_reply_to` is for clients that know no
    threads.
    """
    if root is None and answered is None:
        return content
    relation: Content = {"m.in_reply_to": {"event_id": answered or root}}
    if root is not None:
        relation |= {"rel_type": "m.thread", "event_id": root, "is_falling_back": answered is None}
    return {**content, "m.relates_to": relation}


def unbound(content: Content) -> Content:
    """A content as it was before it became an edit, or was placed."""
    new = content.get("m.new_content")
    found = new if isinstance(new, dict) else content
    return {name: value for name, value in found.items() if name != "m.relates_to"}


def largest(content: Content, binding: Binding) -> Content:
    """The content as it is checked before it is accepted: with the longest event ids, and as an edit if it may be one.

    An edit holds its text twice. What is told in a story may become an `m.notice`.
    """
    if binding.chapter is not None and content.get("msgtype") == "m.text":
        content = {**content, "msgtype": "m.notice"}
    may_edit = binding.edit is not None or (binding.key and binding.on_update == "edit")
    if binding.reacts or binding.redacts or not may_edit:
        if binding.key and binding.on_update in ("thread", "reply"):
            return placed(content, LONGEST_ID, LONGEST_ID)
        return bind(content, binding, lambda _: Found(LONGEST_ID)).content
    return edited(content, LONGEST_ID)
