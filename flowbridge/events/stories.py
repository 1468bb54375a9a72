"""Stories: what a hook says of one thing in several messages (contract §6, "One story, one message"). Pure.

What an event is to those before it is decided when its turn comes (`delivery/binding.py`): it is the first of its
story, an update, or says nothing new.
"""

from dataclasses import dataclass
from typing import Any


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

    def to_json(self) -> list[Any]:
        return [self.state, list(self.firing), self.time, self.digest]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Chapter":
        state, firing, time, digest = value
        return cls(state, tuple(firing), time, digest)
