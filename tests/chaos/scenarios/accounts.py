"""Accounts change their tokens while they have events queued."""

import asyncio
import random
import tempfile
from pathlib import Path

from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.stage import Stage, stage

FAULTS = {"p500": 0.02, "plost": 0.02}  # without 429, after which few requests are under way at once
EVERY_SECONDS = 2.5  # between two renewals
GAP_SECONDS = 2.0  # for which there may be no good token at all
LOST_SHARE = 1.0  # of the answers, for a moment before each renewal
LOST_SECONDS = 0.4  # shorter than a bridge waits before it tries again


async def renewal(options: Options) -> Report:
    """The bot is logged in again and its old token logged out, repeatedly; the bridge is killed meanwhile."""
    kills = options.kills or max(1, round(options.seconds / 5))
    with tempfile.TemporaryDirectory(prefix="flowbridge-renewal-") as folder:
        file = Path(folder) / "token"
        options = options.with_settings(ACCESS_TOKEN="", ACCESS_TOKEN_FILE=str(file))
        renewals: list[str] = []
        _write(file, _token(0))
        async with stage(options, FAULTS) as it:
            async with it.loading():
                stopping = asyncio.Event()
                renewing = asyncio.create_task(_renew(it, file, random.Random(options.seed), renewals, stopping))
                async with asyncio.timeout(options.seconds * 3 + 60):
                    await it.monkey.kill_often(kills, options.seconds)
                stopping.set()
                await renewing
            wanted = max(1, round(options.seconds / (2 * EVERY_SECONDS)))
            it.check("renewals", f"tokens renewed: {len(renewals)}, wanted {wanted}", len(renewals) >= wanted)
            refused = (await it.steer("stats"))["given"].get("401", 0)
            it.check("refusals", f"requests with a token that had ended: {refused}", refused > 0)
            return await it.report("renewal", await it.drain())


def _token(number: int) -> str:
    """Two of three are another device's: a homeserver knows a transaction id by the device that sent it."""
    return f"syt_bot_D{number * 2 // 3}~{number}"


def _write(file: Path, token: str) -> None:
    """Whole or not at all, as secrets are mounted."""
    fresh = file.with_suffix(".new")
    fresh.write_text(token)
    fresh.rename(file)


async def _renew(it: Stage, file: Path, chance: random.Random, renewals: list[str], stopping: asyncio.Event) -> None:
    """Mostly the new token is there before the old one ends, as it should be; else there is none for a moment."""
    number = 0
    while not stopping.is_set():
        await asyncio.sleep(chance.uniform(0.5, 1.5) * EVERY_SECONDS)
        old, new, is_gap = _token(number), _token(number + 1), chance.random() < 0.4
        await it.steer("faults", plost=LOST_SHARE)  # so that events are in doubt when the token changes
        await asyncio.sleep(LOST_SECONDS)
        if not is_gap:
            _write(file, new)
        await it.steer(f"logout?token={old}")
        if is_gap:
            await asyncio.sleep(chance.uniform(0.1, 1.0) * GAP_SECONDS)
            _write(file, new)
        await it.steer("faults", plost=FAULTS["plost"])
        renewals.append(new)
        number += 1
