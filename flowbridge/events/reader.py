"""JSON objects that people write, read key by key, with every problem that they have. Pure."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from flowbridge.errors import Problem
from flowbridge.events.canonical_json import is_unicode, pointer

MAX_PROBLEMS = 100


class Reader:
    """Reads an object key by key, and notes what is wrong. `rule`: what Problem.schema says of it."""

    rule = "json"

    def __init__(
        self, value: Mapping[str, Any], known: Sequence[str], at: str = "", problems: list[Problem] | None = None
    ) -> None:
        self.problems: list[Problem] = [] if problems is None else problems
        self._value = value
        self._at = at
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(name[:80], known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                self.problem(name, f"is unknown here: {hint}")

    def problem(self, name: str, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(pointer(self._at, name) if name else self._at, message, self.rule))

    def text(self, name: str, default: str = "") -> str:
        """A string, which homeservers can store."""
        value = self._value.get(name, default)
        if not isinstance(value, str):
            self.problem(name, "must be a string")
            return default
        if "\0" in value:
            self.problem(name, "holds a NUL character, which homeservers cannot store")
        elif not is_unicode(value):
            self.problem(name, "holds a lone surrogate, which is not Unicode text")
        return value

    def one_of(self, name: str, known: Sequence[str], default: str) -> str:
        value = self._value.get(name, default)
        if value != default and value not in known:
            shown = f", not {value[:80]!r}" if isinstance(value, str) else ""
            listed = " or ".join([", ".join(known[:-1]), known[-1]]) if len(known) > 1 else known[0]
            self.problem(name, f"must be {listed}{shown}")
            return default
        return str(value)


def is_storable(text: str) -> bool:
    """Whether homeservers can store it: Unicode text without NUL."""
    return "\0" not in text and is_unicode(text)
