"""The result of a benchmark, and how it is shown on the terminal and in docs/benchmarks.md."""

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import nginx, peers
from benchmarks.servers import Server

ABOUT = """\
Peers run side by side on one machine, one worker process each, and take turns; the load and the homeserver
share that machine. Compare the ratios with those of other machines, not the absolute figures."""
PACKAGES = [
    "flowbridge",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "httpx",
    "jsonschema",
    "jsonschema-rs",
    "sqlalchemy",
    "matrix-synapse",
]


@dataclass(frozen=True)
class Run:
    """What every benchmark gets: seconds of each measured run, the static upstream, room for files.

    `quick`: figures that tell a change that matters, not those for the documentation.
    """

    seconds: float
    upstream: Server
    directory: Path
    quick: bool = False


@dataclass(frozen=True)
class Target:
    """A figure that flowbridge must reach; `measured` is None when there is nothing to compare."""

    what: str
    measured: float | None
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "met" if met else "**not met**"


@dataclass(frozen=True)
class Section:
    """One benchmark's outcome; `valid` is False when something failed, so that its figures mean nothing."""

    title: str
    about: str
    header: list[str]
    rows: list[list[str]]
    targets: list[Target] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    valid: bool = True

    def markdown(self) -> str:
        return "\n\n".join([f"## {self.title}", self.about, table(self.header, self.rows), *self.notes])


Benchmark = Callable[[Run], Section]


def say(text: str) -> None:
    """Progress, for people."""
    print(text, flush=True)


def table(header: list[str], rows: Sequence[list[str]]) -> str:
    """A Markdown table whose columns line up, so that it reads well on a terminal too."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths) for cells in (header, rule, *rows))


def targets_table(sections: Sequence[Section], last: Mapping[str, float]) -> str:
    """Every target next to its measured figure, and that of the last run."""
    targets = [target for section in sections for target in section.targets]
    rows = [[t.what, _limit(t), _measured(t), _figure(last.get(t.what), t.unit), t.verdict] for t in targets]
    return table(["target", "limit", "measured", "last run", ""], rows)


def figures(sections: Sequence[Section]) -> dict[str, float]:
    """What is kept for the next run."""
    targets = [target for section in sections for target in section.targets]
    return {target.what: round(target.measured, 4) for target in targets if target.measured is not None}


def document(sections: Sequence[Section], command: str, last: Mapping[str, float]) -> str:
    """docs/benchmarks.md."""
    commands = [line for section in sections for line in section.commands]
    parts = [
        "# Benchmarks",
        f"Written by `{command}`. {ABOUT}",
        "## Targets",
        targets_table(sections, last),
        *(section.markdown() for section in sections),
        "## Machine and versions",
        table(["", ""], machine()),
        "## Commands",
        "```sh\n" + "\n".join(dict.fromkeys(commands)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def machine() -> list[list[str]]:
    """Date, hardware and versions."""
    return [
        ["date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")],
        ["CPU", f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores"],
        ["kernel", f"{platform.system()} {platform.release()}"],
        ["Python", platform.python_version()],
        ["packages", ", ".join(_versions())],
        ["peers' own", ", ".join(peers.pinned(lock) for lock in peers.LOCKS)],
        ["nginx", _first_line([nginx.executable() or "nginx", "-v"]).rpartition("/")[2]],
        ["wrk", _first_line(["wrk", "-v"]).split(" [")[0].removeprefix("wrk ")],
    ]


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(command: list[str]) -> str:
    # wrk -v prints its version and exits 1; nginx -v prints it on stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()[0]


def _line(cells: Sequence[str], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _limit(target: Target) -> str:
    return f"{'≥' if target.at_least else '≤'} {target.limit:g}{target.unit}"


def _measured(target: Target) -> str:
    return _figure(target.measured, target.unit)


def _figure(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g}{unit}"
