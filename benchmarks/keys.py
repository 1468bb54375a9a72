"""What a send costs where there are many API keys."""

from contextlib import ExitStack
from statistics import median

from benchmarks import load
from benchmarks.load import SEND_PATH, TOKEN
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import running
from flowbridge.models import ApiKey
from flowbridge.store import Database, api_keys

KEYS = 20_000
ROUNDS = 9
SECONDS = 1.0  # of a round: what a machine does beside changes from one ten seconds to the next
SECRET = "fb_benchmark-benchmark-benchmark-benchmark-{n}"
ABOUT = f"""\
32 connections send messages to 64 rooms with API keys, in turns of {SECONDS:g} s: to a bridge that has one key, and
to one that has {KEYS:,}, each send with another of them. CPU is the bridge's, what it does between requests included;
the ratio is the median of those within a round."""


def keys(run: Run) -> Section:
    """Processor time of a send with one key, and with each of many."""
    cpu: dict[int, list[float]] = {1: [], KEYS: []}
    rates: dict[int, list[float]] = {1: [], KEYS: []}
    failures = 0
    with ExitStack() as stack:
        bridges = {}
        for number in cpu:
            command = flowbridge_command(run.upstream.url)
            file = run.directory / f"keys-{number}.db"
            _fill(f"sqlite:///{file}", number)
            command.environment.update(ACCESS_TOKEN=TOKEN, FLOWBRIDGE_DATABASE_URL=f"sqlite:///{file}")
            bridges[number] = stack.enter_context(running(command, run.directory))
            load.run(bridges[number].url + SEND_PATH, SECONDS, token=SECRET, tokens=number)
        for turn in range(1, ROUNDS + 1):
            for number, bridge in bridges.items():
                before = bridge.cpu_seconds()
                found = load.run(bridge.url + SEND_PATH, SECONDS, token=SECRET, tokens=number)
                cpu[number].append((bridge.cpu_seconds() - before) * 1e6 / max(1, found.requests))
                rates[number].append(found.rate)
                failures += found.failures
            shown = "   ".join(f"{number:,} keys {each[-1]:,.0f} µs" for number, each in cpu.items())
            say(f"  round {turn}/{ROUNDS}  {shown}")
    ratio = median(many / one for one, many in zip(cpu[1], cpu[KEYS], strict=True))
    return Section(
        title="API keys",
        about=ABOUT,
        header=["keys", "sends/s", "CPU µs/send"],
        rows=[[f"{n:,}", f"{median(rates[n]):,.0f}", f"{median(cpu[n]):,.0f}"] for n in cpu],
        targets=[Target(f"{KEYS:,} API keys: processor time of a send with one", ratio, 1.1)],
        valid=not failures,
    )


def _fill(url: str, number: int) -> None:
    database = Database(url)
    database.open()
    with database.engine.begin() as connection:
        for each in range(number):
            api_keys.add(connection, ApiKey(f"key{each}"), SECRET.replace("{n}", str(each)))
    database.close()
