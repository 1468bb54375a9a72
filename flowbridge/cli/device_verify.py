"""`flowbridge device verify`: compare emoji with a client of a user, as the bridge's device.

A bridge that runs lends the device meanwhile. Only the user who was named can begin, so that the question is always
about that one.
"""

import asyncio
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from flowbridge.auth.tokens import secret_key
from flowbridge.bridge import Core
from flowbridge.cli import FAILED, Usage
from flowbridge.cli.device import nothing_to_show, run
from flowbridge.cli.terminal import note, printable, say
from flowbridge.settings import Settings

if TYPE_CHECKING:
    from flowbridge.encryption.machine import Machine
    from flowbridge.encryption.sas import Verification

WAIT_SECONDS = 590.0  # for the whole of it: the device is lent for ten minutes
PAUSE_SECONDS = 0.5  # between two looks for the client's next step


def verify(settings: Settings, user: str) -> int:
    """Wait for the user's client to begin, and ask whether the emoji match; returns the exit code."""
    if not user.startswith("@") or ":" not in user:
        raise Usage(f"{printable(user)} is not a user id: @alice:example.org")
    return run(settings, partial(_verify, user=user))


async def _verify(core: Core, *, user: str) -> int:
    from flowbridge.encryption.sealing import Seal

    keeper = core.make_keeper(nothing_to_show, command=True)
    keeper.unlock(Seal(secret_key(core.settings)))
    async with keeper.borrowing() as machine:
        comparing: list[Verification] = []
        verifications = machine.verifications
        verifications.users, verifications.compare = frozenset({user}), comparing.append
        note(f"Start the verification of {machine.device.user_id} in a client of {user} now, and choose emoji there.")
        ends_at = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < ends_at:
            await machine.fresh(0.0)
            if comparing:
                return await _compare(machine, comparing[0])
            last = verifications.last
            if last is not None and last.is_over:
                return _tell(last)
            await asyncio.sleep(PAUSE_SECONDS)
        if verifications.last is not None:
            await verifications.cancel(verifications.last)
    say(f"no client of {user} has got as far as the emoji within ten minutes")
    return FAILED


async def _compare(machine: "Machine", verification: "Verification") -> int:
    """Ask, and go on with the client's steps meanwhile: it may cancel."""
    theirs = verification.theirs
    note("")
    for emoji in verification.shown:
        note(f"    {emoji.symbol}  {emoji.name}")
    note(f"\nDoes the client of {theirs.user_id} (device {printable(theirs.device_id)}) show the same seven? [yes/no]")
    answer = _line()
    while not verification.is_over:
        if answer.done():
            said = answer.result()
            await machine.verifications.confirm(verification, matches=said.strip().lower() in ("y", "yes"))
            answer = asyncio.get_running_loop().create_future()
        await asyncio.sleep(PAUSE_SECONDS)
        if not verification.is_over:
            await machine.fresh(0.0)
    return _tell(verification)


def _line() -> "asyncio.Future[str]":
    """A line of standard input. Its thread does not hold up the end of the command."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        line = sys.stdin.readline()
        loop.call_soon_threadsafe(found.set_result, line)

    threading.Thread(target=read, daemon=True).start()
    return found


def _tell(verification: "Verification") -> int:
    theirs = verification.theirs
    if verification.succeeded:
        note(f"Verified: {theirs.user_id}, device {printable(theirs.device_id)}.")
        return 0
    say(f"{theirs.user_id} is not verified: {printable(verification.trouble)}")
    return FAILED
