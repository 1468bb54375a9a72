"""Stories: what a hook says of one thing in several messages (contract §6, "One story, one message"). Pure.

What an event is to those before it is decided when its turn comes (`delivery/binding.py`): it is the first of its
story, an update, or says nothing new.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Decision = Literal["new", "update", "notice", "nothing"]

MAX_FIRING = 1_000  # ids that are remembered of one chapter …
MAX_ID = 64  # … and their lengths: a longer one is hashed
LATE_MS = 600_000  # Alertmanager tries for `group_interval` to tell what it has to tell, 5 minutes unless it is set
AHEAD_MS = 300_000  # a sender's clock is so far ahead of ours at most: a later time would silence its story until then
SAID = "said already"
OLDER = "older than what was last said"

_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Chapter:
    """What one event says of its story.

    `state`: `firing`, `resolved`, or "" where there is no such thing. `firing`: ids of what fires. `time`: the
    sender's own time of it (ms). `digest`: of its text; an equal one says nothing new. `ended`: ids of what does not
    fire any more, where the sender lists that, too; else None. `at`: when we were told (ms).
    """

    state: str = ""
    firing: tuple[str, ...] = ()
    time: int | None = None
    digest: str = ""
    ended: tuple[str, ...] | None = None
    at: int = 0

    @property
    def fires(self) -> frozenset[str]:
        """What fires: a story without parts fires as a whole."""
        return frozenset(map(_short, self.firing or ("",))) if self.state == "firing" else frozenset()

    @property
    def bounded(self) -> "Chapter":
        """With no more ids than are remembered: those that come first, so that what is left out can be told."""
        ended = None if self.ended is None else _first(self.ended)
        return replace(self, firing=_first(self.firing), ended=ended)

    def heard(self, accepted_at: int) -> "Chapter":
        """As we were told then (ms). Without a time that cannot be: it goes by the order in which it came."""
        is_wrong = self.time is not None and self.time > accepted_at + AHEAD_MS
        time = None if is_wrong else self.time
        if self.at == accepted_at and not is_wrong:
            return self
        return Chapter(self.state, self.firing, time, self.digest, self.ended, accepted_at)

    def says_same(self, last: "Chapter") -> bool:
        return bool(self.digest) and (self.state, self.fires, self.digest) == (last.state, last.fires, last.digest)

    def begins_to_fire(self, last: "Chapter") -> bool:
        """Whether something fires that did not fire then."""
        began = self.fires - last.fires
        if began and len(last.fires) >= MAX_FIRING:
            return min(began) < max(last.fires)  # of those behind them it is not known
        return bool(began)

    def is_news(self, last: "Chapter") -> bool:
        """Whether alerts of a group are news however old they are: they began, or ended, and that was not told.

        They may go by several clocks, and one may be heard of late: then its beginning is older than another one's end.
        One that its sender took for ended, having heard nothing of it, fires again as the one that it was: that is told
        apart from a message that came late by how late that can be.
        """
        if last.ended is None or self.ended is None:
            return False
        if self.at - last.at > LATE_MS:
            return True
        if max(len(last.fires), len(last.ended)) >= MAX_FIRING:
            return False
        return bool(self.fires - last.fires - set(last.ended) or last.fires & set(map(_short, self.ended)))

    def to_json(self) -> list[Any]:
        ended = None if self.ended is None else list(_first(self.ended))
        return [self.state, list(_first(self.firing)), self.time, self.digest, ended, self.at]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Chapter":
        state, firing, time, digest, *more = value
        ended, at = more or (None, 0)
        return cls(state, tuple(firing), time, digest, None if ended is None else tuple(ended), at)


def decide(chapter: Chapter, last: Chapter | None, *, overtaken: bool = False) -> tuple[Decision, str]:
    """What an event becomes, and why where that is nothing. `last`: what was last said; None: nothing yet.

    `overtaken`: it is replayed, and its turn was before that: only a newer time of the sender's can make it news.
    """
    if last is None:
        return ("notice" if chapter.state == "resolved" else "new"), ""
    if chapter.says_same(last):
        return "nothing", SAID
    if chapter.time is None or last.time is None:
        is_older = overtaken
    else:
        is_older = chapter.time < last.time or (overtaken and chapter.time == last.time)
    if is_older and (overtaken or not chapter.is_news(last)):
        return "nothing", OLDER
    return ("new" if chapter.begins_to_fire(last) else "update"), ""


@dataclass(frozen=True, slots=True)
class Said:
    """What was said of a story, and by which delivery. `number`: of the event in its story that says it (last)."""

    chapter: Chapter
    by: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class Story:
    """What is remembered of a story, beside the message that its key stands for: the newest one that began it.

    `before`: what holds again if the delivery of `last` dies; None where that was the first. Its own delivery was sent:
    each event of a lane ends before the next one's turn. `was`: the delivery and the event id of the message that the
    key stood for then, if `last` began another. `events`: how many there were, with those that died.
    """

    last: Said
    before: Said | None = None
    was: tuple[str, str] | None = None
    events: int = 0

    def confirmed(self, chapter: Chapter, number: int) -> "Story":
        """Said once more, with its time: what is older than that must not overwrite it."""
        last = self.last.chapter
        times = [time for time in (last.time, chapter.time) if time is not None]
        last = replace(last, time=max(times, default=None))
        number, events = max(self.last.number, number), max(self.events, number)
        return replace(self, last=replace(self.last, chapter=last, number=number), events=events)

    def to_json(self) -> str:
        said = [[said.by, said.number, *said.chapter.to_json()] for said in (self.last, self.before) if said]
        return _JSON.encode({"said": said, "was": self.was, "events": self.events})

    @classmethod
    def from_json(cls, text: str) -> "Story":
        found = json.loads(text)
        last, *before = [Said(Chapter.from_json(chapter), by, number) for by, number, *chapter in found["said"]]
        was = tuple(found["was"]) if found["was"] else None
        return cls(last, before[0] if before else None, was, found["events"])


def quiet(content: Mapping[str, Any]) -> dict[str, Any]:
    """A content that pings nobody: clients notify of no `m.notice`, and of no text that mentions nobody."""
    kind = {"msgtype": "m.notice"} if content.get("msgtype") == "m.text" else {}
    return {**content, **kind, "m.mentions": {}}


def _first(names: Collection[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return tuple(sorted({_short(each) for each in names})[:MAX_FIRING])


def _short(name: str) -> str:
    """A name that any store takes, however often it was shortened."""
    is_fit = len(name) <= MAX_ID and name.isprintable()
    return name if is_fit else hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
