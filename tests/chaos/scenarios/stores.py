"""The store is in trouble: its server ends, its network breaks, its disk is full, its file is locked."""

import asyncio
import itertools
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

from tests.chaos.cable import Cable
from tests.chaos.disk import Disk, SizeLimit, memory_disk
from tests.chaos.load import Load
from tests.chaos.options import Options
from tests.chaos.report import Report, at_most
from tests.chaos.scenarios.scenario import FAULTS, SLOW, for_seconds, until
from tests.chaos.stage import Stage, stage, temporary_directory
from tests.postgres import LocalPostgres, execute

DISK_BYTES = 32 * 1024 * 1024
FULL_SECONDS = 6.0
REFUSED_SECONDS = 60.0  # more, on a machine so busy that no send has been refused by then
KILL_CYCLE = 2  # in which the bridge is killed while the disk is full, and has to start on it
LOCKED_SECONDS = 3.0
RETRY_SECONDS = 10.0  # for which a bridge tries to reach its database, with an event in its hand
AGAIN_SECONDS = 30.0  # within which a bridge accepts again, once its store is well


async def restart(options: Options) -> Report:
    """Two bridges whose PostgreSQL ends every few seconds: in order, at once, by kill -9, its parent process alone."""
    server = options.own_postgres
    async with stage(options, SLOW, databases=[options.shared_url] * 2) as it:
        async with it.loading() as load:
            await for_seconds(options.seconds, _end_every(it, server, options.every))
            await asyncio.to_thread(server.start)
            _check_again(it, await _accepts_again(it, load))
        it.check_honest(load)
        return await it.report("restart", await it.drain())


async def network(options: Options) -> Report:
    """Two bridges, each with a wire to PostgreSQL that is cut, carries no answers, or nothing for more than a lease.

    Once it carries no answers and then is gone for longer than a bridge tries: what was committed is not known as such.
    """
    options = options.leased(8.0)
    cables = [Cable.to(options.shared_url) for _ in range(2)]
    for cable in cables:
        await cable.plug()
    try:
        async with stage(options, SLOW, databases=[cable.url(options.shared_url) for cable in cables]) as it:
            it.store_fails = True
            async with it.loading() as load:
                await for_seconds(options.seconds, _break_every(it, cables, options))
                await _mend(cables)
                _check_again(it, await _accepts_again(it, load))
            it.check_honest(load, failures=sum(it.monkey.counts[_name(way)] for way in BREAKS))
            return await it.report("network", await it.drain())
    finally:
        for cable in cables:
            cable.unplug()


async def full(options: Options) -> Report:
    """The disk of the SQLite file is full for some seconds, again and again; once the bridge is killed meanwhile."""
    options = options.with_settings(FLOWBRIDGE_MIN_FREE_DISK_BYTES="0")
    async with AsyncExitStack() as stack:
        below = temporary_directory()
        stack.callback(shutil.rmtree, below, ignore_errors=True)
        small = await stack.enter_async_context(memory_disk(below, DISK_BYTES))
        databases = [f"sqlite:///{small.path / 'flowbridge.db'}"] if small else []
        options = replace(options, prefix=small.prefix if small else ())
        it = await stack.enter_async_context(stage(options, FAULTS, databases=databases))
        disk = small or SizeLimit(it.directory, lambda: [one.process.pid for one in it.monkey.bridges])
        it.notes.append(f"    the disk: {disk.kind}")
        it.store_fails = True
        cycles, again = max(2, round(options.seconds / (FULL_SECONDS + 2 * options.every))), 0.0
        async with it.loading() as load:
            for cycle in range(cycles):
                await asyncio.sleep(options.every)
                await _fill(it, disk, load, kill=cycle == KILL_CYCLE)
                again = max(again, await _accepts_again(it, load))
        _check_again(it, again)
        it.check_honest(load, failures=cycles)
        return await it.report("full", await it.drain())


async def locked(options: Options) -> Report:
    """Another process holds the write lock of the SQLite file for three seconds, again and again."""
    async with stage(options, FAULTS) as it:
        file = it.directory / "flowbridge.db"
        async with it.loading() as load:
            ends = time.monotonic() + options.seconds
            while time.monotonic() < ends:
                await asyncio.sleep(options.every)
                await _lock(file, LOCKED_SECONDS)
                it.monkey.counts["lock"] += 1
            _check_again(it, await _accepts_again(it, load))
        it.check_honest(load)
        return await it.report("locked", await it.drain())


async def _end_every(it: Stage, server: LocalPostgres, pause: float) -> None:
    """In each way in turn, until cancelled; the server is started again at once."""
    ways: dict[str, Callable[[], None]] = {
        "PostgreSQL stopped": server.stop,
        "PostgreSQL killed": server.kill,
        "PostgreSQL aborted": server.abort,
        "postmaster killed": lambda: _kill_parent(server),
    }
    for name, end in itertools.cycle(ways.items()):
        await asyncio.sleep(pause)
        it.monkey.counts[name] += 1
        await _whole(asyncio.to_thread(end))
        await _whole(asyncio.to_thread(server.start))


def _kill_parent(server: LocalPostgres) -> None:
    if server.pid is not None:
        os.kill(server.pid, signal.SIGKILL)


async def _whole(doing: Awaitable[None]) -> None:
    """Not left in its midst when the time is over."""
    task = asyncio.ensure_future(doing)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def _break_every(it: Stage, cables: list[Cable], options: Options) -> None:
    """One cable after the other, in each way in turn, until cancelled."""
    chance = random.Random(options.seed)
    for way, cable in zip(itertools.cycle(BREAKS), _turns(cables, chance), strict=False):
        await asyncio.sleep(chance.uniform(0.2, 0.6) * options.every)
        it.monkey.counts[_name(way)] += 1
        await way(cable, options)


def _name(way: Callable[..., object]) -> str:
    return way.__name__.strip("_").replace("_", " ")


def _turns(cables: list[Cable], chance: random.Random) -> Iterator[Cable]:
    while True:
        yield chance.choice(cables)


async def _cut(cable: Cable, _: Options) -> None:
    cable.cut()


async def _deafen(cable: Cable, _: Options) -> None:
    cable.deafen()
    await asyncio.sleep(0.2)
    cable.cut()
    cable.hear()


async def _unplug(cable: Cable, _: Options) -> None:
    cable.unplug()
    await asyncio.sleep(2)
    await cable.plug()


async def _freeze(cable: Cable, _: Options) -> None:
    cable.freeze()
    await asyncio.sleep(2)
    cable.thaw()


async def _terminate(_: Cable, options: Options) -> None:
    """All connections, by the server, which says so."""
    statement = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    await asyncio.to_thread(execute, options.shared_url, f"{statement} AND datname = current_database()")


async def _freeze_long(cable: Cable, options: Options) -> None:
    """Longer than the lease: a bridge that cannot renew it must stop sending."""
    assert options.lease is not None
    cable.freeze()
    await asyncio.sleep(options.lease + 3)
    cable.thaw()


async def _vanish(cable: Cable, _: Options) -> None:
    """In the midst of a commit of new events."""
    cable.deafen_from(b"COMMIT", after=b"msgtype")
    await asyncio.sleep(0.2)
    cable.unplug()
    cable.hear()
    await asyncio.sleep(RETRY_SECONDS + 3)
    await cable.plug()


BREAKS = (_cut, _deafen, _unplug, _freeze, _terminate, _freeze_long, _vanish)


async def _mend(cables: list[Cable]) -> None:
    for cable in cables:
        cable.hear()
        cable.thaw()
        if not cable.plugged:
            await cable.plug()


async def _fill(it: Stage, disk: Disk, load: Load, *, kill: bool) -> None:
    """Keep the disk full for some seconds; some send must have been refused, unless the error may pass unnoticed."""
    refused, least = load.answers["503 + Retry-After"], 1 if disk.says_full else 0
    it.monkey.counts["disk filled"] += 1
    ends = time.monotonic() + FULL_SECONDS

    def is_refused() -> bool:
        return load.answers["503 + Retry-After"] - refused >= least

    while time.monotonic() < ends or (not is_refused() and time.monotonic() < ends + REFUSED_SECONDS):
        disk.fill()
        if kill and time.monotonic() > ends - FULL_SECONDS / 2:
            kill = False
            await it.monkey.kill(it.bridge)
        await asyncio.sleep(0.05)
    disk.empty()
    found = load.answers["503 + Retry-After"] - refused
    it.check("full", f"answers 503 while the disk was full: {found:,}, wanted ≥ {least}", found >= least)


async def _lock(file: Path, seconds: float) -> None:
    with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as connection:
        while True:
            with suppress(sqlite3.OperationalError):
                connection.execute("BEGIN IMMEDIATE")
                break
            await asyncio.sleep(0.001)
        await asyncio.sleep(seconds)
        connection.execute("ROLLBACK")


async def _accepts_again(it: Stage, load: Load) -> float:
    """Seconds until as many events as there are rooms were accepted from now on."""
    began, before = time.monotonic(), load.accepted

    async def again() -> bool:
        return load.accepted >= before + it.plan.size

    await until(again, AGAIN_SECONDS)
    return time.monotonic() - began


def _check_again(it: Stage, seconds: float) -> None:
    it.checks.append(at_most("again", "accepting again after, s", seconds, AGAIN_SECONDS - 1))
