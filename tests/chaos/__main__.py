"""`python -m tests.chaos [SCENARIO …]`: run them, print the verdicts; 1: the promise was broken, 2: cannot run."""

import argparse
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

from tests.chaos import trial
from tests.chaos.options import Options
from tests.chaos.report import Report, table
from tests.chaos.runner import run
from tests.chaos.scenarios import LONG, SCENARIOS, Scenario
from tests.chaos.seeds import SOWN

GOOD, BROKEN, CANNOT_RUN = 0, 1, 2
EVERY_SECONDS = 10.0


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _arguments() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="\n".join(f"{name:10}{one.about}" for name, one in SCENARIOS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("scenario", nargs="*", help="none: all of them")
    add("--seconds", type=float, help=f"length of the load; when no scenario is named, that of {' and '.join(LONG)}")
    add("--seeds", action="store_true", help="show that the judge can fail: run each seeded bug, or those named")
    add("--bridge", default=default.bridge, help="another command to judge, {port} in it; it gets the same environment")
    add("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting more for the bridge")
    add("--database-url", help="shared by the replicas; else a PostgreSQL of the run's own")
    add("--rooms", type=int, default=default.rooms, help="rooms whose events are repeated until they are answered")
    add("--fire", type=int, default=default.fire, help="rooms whose events have no key and are never repeated")
    add("--states", type=int, default=default.states, help="rooms that get state events")
    add("--matrix", type=int, default=default.matrix, help="rooms that a Matrix client sends to")
    add(
        "--mode",
        choices=("async", "wait", "mixed"),
        default=default.mode,
        help="Prefer: respond-async, or not, or both",
    )
    add("--kills", type=int, help="sqlite: how many kill -9 (one each 1.9 s); replicas: the same")
    add("--every", type=float, default=default.every, help="seconds between two attacks")
    add("--lease", type=float, help="the bridge's lease in seconds (stop, network: 8; others: the bridge's own)")
    add("--latency", type=float, default=default.latency, help="of the scripted homeserver, in milliseconds")
    add("--remember", type=float, default=default.remember, help="memory: seconds that the homeserver knows a send")
    add("--rate", type=float, help="events/s: storm: allowed (20); outage (200), memory (400), proxy (200): sent")
    add("--events", type=int, default=default.events, help="drain: how many for each room")
    add(
        "--patience", type=float, default=default.patience, help="seconds without an event after which the rest is lost"
    )
    add("--drain", type=float, default=default.drain, help="seconds after the load within which all must have arrived")
    add("--progress", type=float, default=EVERY_SECONDS, help="seconds between two lines on how far it is; 0: none")
    add("--seed", type=int, default=default.seed)
    add("--directory", type=Path, help="where the databases and logs are, kept afterwards; must be new")
    add("--keep", action="store_true", help="keep the temporary directory and say where it is")
    return parser


def judge(scenarios: list[Scenario], options: Options, seconds: float | None, *, named: bool) -> int:
    """Run one after another; a table at the end when there are several."""
    reports: list[Report] = []
    idle: list[str] = []
    for scenario in scenarios:
        print(f"\n{scenario.name}: {scenario.about}", flush=True)
        long = seconds if named or scenario.name in LONG else None
        found = run(scenario, replace(options, seconds=long or scenario.seconds))
        if isinstance(found, Report):
            reports.append(found)
            print(found, flush=True)
        else:
            idle.append(scenario.name)
            print(f"{scenario.name} could not run: {found}", file=sys.stderr, flush=True)
    if len(scenarios) > 1:
        print(f"\n{table(reports)}", flush=True)
    if not all(report.good for report in reports):
        return BROKEN
    return CANNOT_RUN if idle else GOOD


def main() -> int:
    parser = _arguments()
    given = vars(parser.parse_args())
    names = {field.name for field in fields(Options)} - {"seconds"}
    options = Options(**{name: value for name, value in given.items() if name in names}, environment=dict(given["set"]))
    print(f"$ python -m tests.chaos {shlex.join(sys.argv[1:])}", flush=True)
    chosen, known = given["scenario"], SOWN if given["seeds"] else SCENARIOS
    if unknown := set(chosen) - known.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if given["seeds"]:
        return trial.trial(chosen or list(known), options)
    return judge([SCENARIOS[name] for name in chosen or SCENARIOS], options, given["seconds"], named=bool(chosen))


if __name__ == "__main__":
    sys.exit(main())
