"""Encrypted rooms of a real Synapse, as another client reads them."""

import shutil
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from tests.chaos.homeserver import BY_KEY, Homeserver
from tests.chaos.lossy import Lossy
from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.scenarios.scenario import for_seconds
from tests.chaos.stage import Stage, stage, temporary_directory
from tests.chaos.witness import Witness, witness

MOST_ROOMS = 6  # the witness reads them one event after the other
LEASE_SECONDS = 8.0
LEASES = 2.0  # that pass between two kills of replicas: the device of a dead one is free after one


async def encrypted(options: Options) -> Report:
    """One bridge and encrypted rooms: kill -9, keys that get lost on their way, syncs that are cut off, 429s."""
    return await _encrypted("encrypted", options.leased(LEASE_SECONDS))


async def encrypted_replicas(options: Options) -> Report:
    """The same with two on one PostgreSQL, of which one has the device."""
    options = options.leased(LEASE_SECONDS)
    options = replace(options, every=max(options.every, LEASES * (options.lease or LEASE_SECONDS)))
    return await _encrypted("encrypted_replicas", options, [options.shared_url] * 2)


async def _encrypted(name: str, options: Options, databases: Sequence[str] = ()) -> Report:
    options = replace(options, rooms=min(options.rooms, MOST_ROOMS), fire=0, states=0, matrix=0)
    options = options.with_settings(FLOWBRIDGE_ENCRYPTED_ROOMS="encrypt")
    async with AsyncExitStack() as stack:
        directory = temporary_directory()
        log = directory / "homeserver.events"
        seen = await stack.enter_async_context(witness(log, options.rooms))
        lossy = Lossy(seen.homeserver.url, options.seed)
        url = await stack.enter_async_context(lossy.open())
        homeserver = Homeserver((url,), log, seen.bot.access_token, (BY_KEY,), seen.rooms, scripted=False)
        it = await stack.enter_async_context(stage(options, homeserver=homeserver, databases=databases))
        async with it.loading():
            kills = float("inf") if options.kills is None else options.kills
            await for_seconds(options.seconds, it.monkey.kill_every(options.every, at_work=True, kills=kills))
        drained = await it.drain()
        _check(it, seen, lossy)
        report = await it.report(name, drained)
        if not it.keep:
            shutil.rmtree(directory, ignore_errors=True)
        return report


def _check(it: Stage, seen: Witness, lossy: Lossy) -> None:
    unread = "".join(f"\n      {text}" for text in seen.unread[:5])
    it.check("unread", f"events that the witness could not decrypt: {len(seen.unread)}{unread}", not seen.unread)
    it.check("plain", f"events that were not encrypted: {len(seen.plain)}", not seen.plain)
    it.check("device", f"devices that encrypted them: {len(seen.devices)}", len(seen.devices) == 1)
    fates = ", ".join(f"{fate} {times:,}" for fate, times in lossy.counts.most_common())
    it.notes.append(f"    between bridge and homeserver: {fates}")
    for fate in ("limited", "dropped", "lost", "cut"):
        it.monkey.counts[fate] += lossy.counts[fate]
