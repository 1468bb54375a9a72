"""Stories: what a hook says of one thing in several messages (contract §6, "One story, one message"). Pure.

What an event is to those before it is decided when its turn comes (`delivery/binding.py`): it is the first of its
story, an update, or says nothing new.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Decision = Literal["new", "update", "notice", "nothing"]

MAX_FIRING = 1_000  # ids that are remembered of one chapter …
MAX_ID = 64  # … and their lengths: a longer one is hashed
AHEAD_MS = 300_000  # a sender's clock is so far ahead of ours at most: a later time would silence its story until then
SAID = "said already"
OLDER = "older than what was last said"


@dataclass(frozen=True, slots=True)
class Chapter:
    """What one event says of its story.

    `state`: `firing`, `resolved`, or "" where there is no such thing. `firing`: ids of what fires. `time`: the
    sender's own time of it (ms). `digest`: of its text; an equal one says nothing new.
    """

    state: str = ""
    firing: tuple[str, ...] = ()
    time: int | None = None
    digest: str = ""

    @property
    def fires(self) -> frozenset[str]:
        """What fires: a story without parts fires as a whole."""
        return frozenset(self.firing or ("",)) if self.state == "firing" else frozenset()

    @property
    def bounded(self) -> "Chapter":
        """With no more ids than are remembered: those that come first, so that what is left out can be told."""
        firing = sorted({_short(each) for each in self.firing})[:MAX_FIRING]
        return replace(self, firing=tuple(firing))

    def heard(self, accepted_at: int) -> "Chapter":
        """Without a time that cannot be (ms): it goes by the order in which it came."""
        is_wrong = self.time is not None and self.time > accepted_at + AHEAD_MS
        return replace(self, time=None) if is_wrong else self

    def says_same(self, last: "Chapter") -> bool:
        return bool(self.digest) and (self.state, self.fires, self.digest) == (last.state, last.fires, last.digest)

    def begins_to_fire(self, last: "Chapter") -> bool:
        """Whether something fires that did not fire then."""
        began = self.fires - last.fires
        if began and len(last.fires) >= MAX_FIRING:
            return min(began) < max(last.fires)  # of those behind them it is not known
        return bool(began)

    def to_json(self) -> list[Any]:
        bounded = self.bounded
        return [bounded.state, list(bounded.firing), bounded.time, bounded.digest]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Chapter":
        state, firing, time, digest = value
        return cls(state, tuple(firing), time, digest)


def decide(chapter: Chapter, last: Chapter | None, *, overtaken: bool = False) -> tuple[Decision, str]:
    """What an event becomes, and why where that is nothing. `last`: what was last said; None: nothing yet.

    `overtaken`: its turn was before that, and it is replayed: only a newer time of the sender's can make it news.
    """
    if last is None:
        return ("notice" if chapter.state == "resolved" else "new"), ""
    if chapter.says_same(last):
        return "nothing", SAID
    if chapter.time is None or last.time is None:
        is_older = overtaken
    else:
        is_older = chapter.time < last.time or (overtaken and chapter.time == last.time)
    if is_older:
        return "nothing", OLDER
    return ("new" if chapter.begins_to_fire(last) else "update"), ""


@dataclass(frozen=True, slots=True)
class Said:
    """What was said of a story, and by which delivery."""

    chapter: Chapter
    by: str


@dataclass(frozen=True, slots=True)
class Story:
    """What is remembered of a story, beside the message that its key stands for: the newest one that began it.

    `before`: what holds again if the delivery of `last` dies; None where that was the first. Its own delivery was sent:
    each event of a lane ends before the next one's turn. `was`: the delivery and the event id of the message that the
    key stood for then, if `last` began another.
    """

    last: Said
    before: Said | None = None
    was: tuple[str, str] | None = None

    def confirmed(self, chapter: Chapter) -> "Story":
        """Said once more, with its time: what is older than that must not overwrite it."""
        last = self.last.chapter
        times = [time for time in (last.time, chapter.time) if time is not None]
        return replace(self, last=replace(self.last, chapter=replace(last, time=max(times, default=None))))

    def to_json(self) -> str:
        said = [[said.by, *said.chapter.to_json()] for said in (self.last, self.before) if said is not None]
        return json.dumps({"said": said, "was": self.was}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Story":
        found = json.loads(text)
        last, *before = [Said(Chapter.from_json(chapter), by) for by, *chapter in found["said"]]
        return cls(last, before[0] if before else None, tuple(found["was"]) if found["was"] else None)


def quiet(content: Mapping[str, Any]) -> dict[str, Any]:
    """A content that pings nobody: clients notify of no `m.notice`, and of no text that mentions nobody."""
    kind = {"msgtype": "m.notice"} if content.get("msgtype") == "m.text" else {}
    return {**content, **kind, "m.mentions": {}}


def _short(name: str) -> str:
    return name if len(name) <= MAX_ID else hashlib.sha256(name.encode()).hexdigest()
