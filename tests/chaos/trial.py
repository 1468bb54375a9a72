"""The judge itself on trial: each seeded bug must turn it red, and what is harmless must not."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from tests.chaos.options import Options
from tests.chaos.report import Report, markdown
from tests.chaos.runner import run
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.seeds import HARMLESS, SEEDS, Seed

SOUND = "none"  # the bridge as it is, in a scenario and with options that a seed has
GOOD, BROKEN = 0, 1


def sown(name: str, options: Options) -> Options:
    """With a bridge that has this bug, and what shows it."""
    seed = {**SEEDS, **HARMLESS}[name]
    start = [sys.executable, "-m", "tests.chaos.seeds", name, *_short_memory(seed), "serve", "--port", "{port}"]
    return replace(options, bridge=shlex.join(start), **seed.options)


def _short_memory(seed: Seed) -> list[str]:
    from tests.chaos.scenarios.homeservers import short_memory

    return [short_memory(seed.options["remember"])] if "remember" in seed.options else []


def try_seed(name: str, options: Options) -> Report | str:
    """What the judge says of this bug."""
    seed = {**SEEDS, **HARMLESS}[name]
    return run(SCENARIOS[seed.scenario], sown(name, options))


def found_out(seed: Seed, report: Report) -> bool:
    """Whether what had to turn red did; of what is harmless, nothing."""
    return bool(set(seed.red) & set(report.red)) if seed.red else report.good


def trial(names: Sequence[str], options: Options) -> int:
    """Run each, print a table; 1 when one was not found out."""
    rows: list[list[str]] = []
    good = True
    for name in names:
        seed = {**SEEDS, **HARMLESS}[name]
        print(f"\n{name}: {seed.about}, in {seed.scenario}", flush=True)
        found = try_seed(name, options)
        print(found, flush=True)
        fine = isinstance(found, Report) and found_out(seed, found)
        good = good and fine
        rows.append([seed.about, seed.scenario, *_cells(seed, found), "" if fine else "**not found out**"])
    print("\n" + markdown(("seeded bug", "scenario", "what turned red", "evidence", ""), rows), flush=True)
    return GOOD if good else BROKEN


def _cells(seed: Seed, found: Report | str) -> list[str]:
    if isinstance(found, str):
        return ["could not run", found]
    return [", ".join(found.red) or "nothing", _evidence(found)]


def _evidence(report: Report) -> str:
    verdict = report.verdict
    counts = {
        "lost": len(verdict.lost),
        "doubled": len(verdict.doubled),
        "out of order": sum(map(len, verdict.out_of_order.values())),
        "untrue": len(verdict.untrue),
    }
    counted = [f"{number:,} {name}" for name, number in counts.items() if number]
    counted += [check.what.splitlines()[0] for check in report.checks if not check.good]
    return f"of {verdict.accepted:,} accepted: {'; '.join(counted) or 'nothing'}"
