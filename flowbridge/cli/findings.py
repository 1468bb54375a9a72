"""What `flowbridge doctor` finds: one line for each check."""

from collections.abc import Sequence
from typing import NamedTuple

from flowbridge.cli.terminal import as_json, printable

_MARKS = {True: "ok", False: "BAD", None: "--"}
_STATES = {True: "ok", False: "bad", None: "note"}


class Finding(NamedTuple):
    """`good` is None where it is unknown, or nothing is set up."""

    what: str
    good: bool | None
    says: str


def show(findings: Sequence[Finding], *, in_json: bool) -> None:
    """Print them. What rooms are called comes from others, and must not control the terminal."""
    if in_json:
        print(as_json([{"check": what, "state": _STATES[good], "says": says} for what, good, says in findings]))
        return
    for what, good, says in findings:
        print(f"{_MARKS[good]:<4} {what:<12} {' '.join(printable(says).splitlines())}")
