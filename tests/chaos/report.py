"""The result of a scenario: the verdict, further figures, and both as a table for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.judge import Verdict


@dataclass(frozen=True)
class Check:
    """A figure beside the verdict, and whether it is as required. `short`: its cell in a table, if it has one."""

    name: str
    what: str
    good: bool
    short: str = ""


def at_least(name: str, what: str, value: float, least: float) -> Check:
    return Check(name, f"{what}: {value:,.0f}, wanted ≥ {least:,.0f}", value >= least, f"{what} {value:,.0f}")


def at_most(name: str, what: str, value: float, most: float) -> Check:
    return Check(name, f"{what}: {value:,.0f}, wanted ≤ {most:,.0f}", value <= most, f"{what} {value:,.0f}")


@dataclass(frozen=True)
class Report:
    """`did`: what the monkey did, and how often; `given`: what the homeserver did."""

    scenario: str
    verdict: Verdict
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    did: Counter[str] = field(default_factory=Counter)
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.red

    @property
    def red(self) -> tuple[str, ...]:
        """The names of what is not as it must be."""
        return (*self.verdict.red, *(check.name for check in self.checks if not check.good))

    def __str__(self) -> str:
        checks = [f"{'ok ' if check.good else 'BAD'} {check.what}" for check in self.checks]
        head = f"{self.scenario}: {'kept its promise' if self.good else 'BROKE ITS PROMISE'}"
        return "\n".join([head, str(self.verdict), *checks, *self.notes])


HEAD = ("scenario", "seconds", "what was done to it", "accepted", "lost", "doubled", "out of order", "figures", "")


def table(reports: Sequence[Report]) -> str:
    """One row for each, in Markdown."""
    return markdown(HEAD, [_row(report) for report in reports])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(report: Report) -> list[str]:
    verdict = report.verdict
    return [
        report.scenario,
        f"{report.seconds:.0f}",
        _done(report),
        f"{verdict.accepted:,}",
        f"{len(verdict.lost):,}",
        f"{len(verdict.doubled):,}",
        f"{sum(map(len, verdict.out_of_order.values())):,}",
        ", ".join(check.short for check in report.checks if check.short),
        "kept" if report.good else f"**broken**: {', '.join(report.red)}",
    ]


def _done(report: Report) -> str:
    faults = sum(times for what, times in report.given.items())
    done = [f"{times:,}x {what}" for what, times in report.did.items() if what not in ("crash", "stuck", "unclean")]
    return ", ".join([*done, *([f"{faults:,} faults"] if faults else [])])
