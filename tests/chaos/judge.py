"""The judgement: what was accepted against what the rooms hold. Pure, and knows nothing of any bridge."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 5  # offenders of each kind that a summary names


@dataclass(frozen=True, slots=True)
class Accepted:
    """An event that the bridge took on: `status` 200 or 202; `event_id` where the answer named one.

    Also, with `status` 503, one that it refused and that was not sent again.
    """

    room: str
    n: int
    status: int
    event_id: str | None = None
    at: float = 0.0
    ms: float = 0.0

    @property
    def is_promised(self) -> bool:
        return self.status < 300


@dataclass(frozen=True, slots=True)
class Seen:
    """An event that is in its room, in the order of the homeserver's log."""

    room: str
    n: int
    event_id: str
    txn_id: str | None = None
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`untrue`: a 200 named an event id that is not the event's, or what is there was answered 503.

    `rate`: events a second that reached their rooms.
    """

    accepted: int
    seen: int
    distinct: int
    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    out_of_order: dict[str, tuple[str, ...]]
    untrue: tuple[str, ...]
    rate: float

    @property
    def good(self) -> bool:
        return not self.red

    @property
    def red(self) -> tuple[str, ...]:
        """The names of what was broken."""
        found = {"lost": self.lost, "doubled": self.doubled, "out of order": self.out_of_order, "untrue": self.untrue}
        return tuple(name for name, offenders in found.items() if offenders)

    def __str__(self) -> str:
        disorder = [f"{room}: {text}" for room, texts in self.out_of_order.items() for text in texts]
        lines = [
            f"accepted {self.accepted:,} · seen {self.seen:,} · distinct {self.distinct:,} · {self.rate:,.0f}/s",
            _line("lost", self.lost),
            _line("doubled", self.doubled),
            _line("out of order", disorder),
            _line("untrue", self.untrue),
        ]
        return "\n".join(lines)


def judge(accepted: Iterable[Accepted], seen: Iterable[Seen]) -> Verdict:
    """Events that were never answered may be there or not, but not twice; order is asked of the accepted ones."""
    answered = {(one.room, one.n): one for one in accepted}
    promised = {key: one for key, one in answered.items() if one.is_promised}
    copies: dict[tuple[str, int], list[Seen]] = {}
    for one in seen:
        copies.setdefault((one.room, one.n), []).append(one)
    times = [one.at for found in copies.values() for one in found]
    return Verdict(
        accepted=len(promised),
        seen=len(times),
        distinct=len(copies),
        lost=tuple(f"{_name(one)} (answered {one.status})" for key, one in promised.items() if key not in copies),
        doubled=tuple(_copies(found) for found in copies.values() for _ in found[1:]),
        out_of_order=_disorder(found[0] for key, found in copies.items() if key in promised),
        untrue=tuple(
            f"{_name(one)} is not {one.event_id}" if one.is_promised else f"{_name(one)} was answered {one.status}"
            for key, one in answered.items()
            if key in copies and not _is_true(one, copies[key])
        ),
        rate=len(times) / span if times and (span := max(times) - min(times)) else 0.0,
    )


def read_accepted(path: Path) -> list[Accepted]:
    return [Accepted(**line) for line in read_lines(path)]


def read_seen(path: Path, rooms: Iterable[str]) -> list[Seen]:
    """The homeserver's log, of these rooms only: a database may still hold what an earlier run left."""
    wanted = set(rooms)
    return [
        Seen(line["room"], line["n"], line["event_id"], line["txn_id"], line["at"])
        for line in read_lines(path)
        if line["room"] in wanted and line["n"] is not None
    ]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log that may still be written to."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _is_true(one: Accepted, copies: list[Seen]) -> bool:
    """What was said of an event that is in its room."""
    return one.is_promised and (one.event_id is None or one.event_id in {copy.event_id for copy in copies})


def _name(one: Accepted | Seen) -> str:
    return f"{one.room}#{one.n}"


def _copies(found: list[Seen]) -> str:
    return f"{_name(found[0])} as " + ", ".join(f"{one.event_id} (txnId {one.txn_id})" for one in found)


def _disorder(found: Iterable[Seen]) -> dict[str, tuple[str, ...]]:
    """Per room, each event that came after one that was accepted later."""
    latest: dict[str, int] = {}
    offenders: dict[str, list[str]] = {}
    for one in found:
        before = latest.get(one.room, -1)
        if one.n < before:
            offenders.setdefault(one.room, []).append(f"#{one.n} after #{before}")
        latest[one.room] = max(before, one.n)
    return {room: tuple(texts) for room, texts in offenders.items()}


def _line(what: str, offenders: Iterable[str]) -> str:
    texts = list(offenders)
    named = "".join(f"\n    {text}" for text in texts[:SHOWN])
    more = f"\n    … and {len(texts) - SHOWN:,} more" if len(texts) > SHOWN else ""
    return f"{what:<13}{len(texts):,}{named}{more}"
