"""`python -m benchmarks`: which benchmarks there are, in what order they run, and where the results go."""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks import nginx
from benchmarks.cost import cost
from benchmarks.durable import durable
from benchmarks.encryption import encryption
from benchmarks.footprint import memory, start
from benchmarks.growth import history, rooms
from benchmarks.hogs import hogs
from benchmarks.hooks import hooks
from benchmarks.keys import keys
from benchmarks.latency import latency
from benchmarks.live import live
from benchmarks.messages import messages
from benchmarks.nodes import nodes
from benchmarks.relay import relay
from benchmarks.report import Benchmark, Run, Section, document, figures, say, targets_table
from benchmarks.servers import REPOSITORY, running
from benchmarks.throughput import throughput

BENCHMARKS: dict[str, Benchmark] = {
    "throughput": throughput,
    "cost": cost,
    "outbox": durable,
    "rooms": rooms,
    "history": history,
    "memory": memory,
    "start": start,
    "latency": latency,
    "relay": relay,
    "live": live,
    "messages": messages,
    "hooks": hooks,
    "keys": keys,
    "nodes": nodes,
    "hogs": hogs,
    "encryption": encryption,
}
QUICK = ("cost", "rooms", "history")  # what is measured in two minutes, while one works
RESULTS = REPOSITORY / "docs" / "benchmarks.md"
FIGURES = REPOSITORY / "docs" / "benchmarks.json"  # of the last run, for the next one


def main() -> int:
    """Exit code 0, 1 when a result is invalid or missing, 2 when nothing can be run, 130 after Ctrl-C."""
    options = _options()
    missing = [name for name, path in (("nginx", nginx.executable()), ("wrk", shutil.which("wrk"))) if not path]
    if missing:
        say(f"The benchmarks need {' and '.join(missing)}: apt-get install nginx-light wrk")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the servers then, too
    try:
        names = options.names or options.only or list(QUICK if options.quick else BENCHMARKS)
        sections = _run(names, options.seconds, quick=options.quick)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    last = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    say(f"\n## Targets\n\n{targets_table(sections, last)}")
    if not all(section.valid for section in sections):
        say("\nSome results are missing or invalid, so nothing is written.")
        return 1
    if not (options.no_write or options.only or options.names or options.quick):
        _write(document(sections, f"python -m benchmarks --seconds {options.seconds:g}", last))
        FIGURES.write_text(json.dumps(figures(sections), indent=2) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="flowbridge beside its peers")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all of them")
    parser.add_argument("--seconds", type=float, default=5, help="length of each measured run (default: 5)")
    parser.add_argument(
        "--only", type=_names, metavar="A,B", help=f"of {', '.join(BENCHMARKS)}; results are not written then"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} with short runs, in two minutes; nothing is written"
    )
    parser.add_argument("--no-write", action="store_true", help="print the results, leave docs/benchmarks.md")
    options = parser.parse_args()
    options.names = _names(",".join(options.names)) if options.names else []
    if options.quick:
        options.seconds = min(options.seconds, 2)
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(BENCHMARKS)}")
    return names


def _run(names: list[str], seconds: float, *, quick: bool) -> list[Section]:
    with tempfile.TemporaryDirectory(prefix="flowbridge-bench-") as temporary:
        directory = Path(temporary)
        with running(nginx.homeserver(directory), directory) as upstream:
            return [_one(name, Run(seconds, upstream, directory, quick)) for name in names]


def _one(name: str, run: Run) -> Section:
    say(f"\n{name}: running")
    try:
        section = BENCHMARKS[name](run)
    except Exception as error:  # one that fails must not cost the results of the others
        why = f"{type(error).__name__}: {error}"
        section = Section(name.capitalize(), "This could not be measured.", ["why"], [[why]], valid=False)
    say(f"\n{section.markdown()}")
    return section


def _write(text: str) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    say(f"\nwritten: {RESULTS.name} in {RESULTS.parent.name}/")


if __name__ == "__main__":
    sys.exit(main())
