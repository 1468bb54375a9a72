"""`flowbridge device`: make the bot's device the account's own, and say how it stands.

A bridge that runs on the same store lends the device meanwhile: what is to be encrypted waits for so long.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import typer

from flowbridge import log
from flowbridge.auth.tokens import cipher, secret_key
from flowbridge.bridge import Core
from flowbridge.cli import FAILED, Usage
from flowbridge.cli.terminal import as_json, confirmed, note, printable, say
from flowbridge.errors import MatrixError
from flowbridge.settings import Settings
from flowbridge.store import crypto
from flowbridge.store.accounts import account_of

if TYPE_CHECKING:
    from flowbridge.encryption.setup import Report

NOT_INSTALLED = "encryption needs a library: pip install 'flowbridge[e2ee]'"
REPLACING = (
    "The account's cross-signing keys will be replaced. Its other devices are not signed any more, and whoever has "
    "verified it sees a warning. Replace them?"
)


def set_up(settings: Settings, *, reset: bool, yes: bool) -> int:
    """Make the device and sign it; returns the exit code."""
    if reset and not yes and not confirmed(REPLACING):
        return FAILED
    return run(settings, partial(_set_up, reset=reset), make=True)


def recover(settings: Settings) -> int:
    """Sign the device by the account's recovery key; returns the exit code."""
    asked = "Recovery key or passphrase"
    given = typer.prompt(asked, hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    return run(settings, partial(_recover, given=given.strip()))


def status(settings: Settings, *, in_json: bool) -> int:
    """Print how the device stands; returns the exit code: 1 unless others may rely on it."""
    return run(settings, partial(_status, in_json=in_json))


def require_library() -> None:
    """Raise Usage without the extra `e2ee`."""
    if find_spec("vodozemac") is None:
        raise Usage(NOT_INSTALLED)


def run(settings: Settings, work: Callable[[Core], Awaitable[int]], *, make: bool = False) -> int:
    require_library()
    if not settings.has_bot:
        raise Usage("there is no bot account, whose device it would be: set ACCESS_TOKEN")
    log.setup(settings.log_format, "warning")
    from flowbridge.encryption.olm import CryptoError

    async def main() -> int:
        async with _opened(settings, make=make) as core:
            return await work(core)

    try:
        return asyncio.run(main())
    except (CryptoError, MatrixError) as error:
        say(printable(str(error)))
        return FAILED


@contextlib.asynccontextmanager
async def _opened(settings: Settings, *, make: bool) -> AsyncIterator[Core]:
    """The core with its store, which a bridge may be running on."""
    core = Core(settings, beside=True)
    core.database.open(shared=True, make=make)
    core.tokens.unlock(cipher(settings))
    core.database.start()
    try:
        yield core
    finally:
        await core.database.stop()
        core.homeserver.close()


async def _set_up(core: Core, *, reset: bool) -> int:
    from flowbridge.encryption import setup
    from flowbridge.encryption.key_server import ProofNeeded
    from flowbridge.encryption.sealing import Seal

    def show(recovery_key: str) -> None:
        print(recovery_key, flush=True)
        note("This is the recovery key of the bridge's account. It is not shown again: keep it.")

    keeper = core.make_keeper(show, command=True)
    keeper.unlock(Seal(secret_key(core.settings)))
    password = core.settings.password.get_secret_value() if core.settings.password else ""
    async with keeper.borrowing() as machine:
        report = await setup.report(machine.device, keeper.server)
        if report.standing == "absent":
            await machine.publish()
        if report.standing != "signed" or not report.has_storage or reset:
            sign = partial(setup.cross_sign, machine.device, keeper.server, show=show, reset=reset)
            try:
                await sign(password=password)
            except ProofNeeded:
                if password or not sys.stdin.isatty():
                    raise
                await sign(password=typer.prompt("The account's password", hide_input=True, err=True))
            report = await setup.report(machine.device, keeper.server)
    return _tell(report)


async def _recover(core: Core, *, given: str) -> int:
    from flowbridge.encryption import setup
    from flowbridge.encryption.sealing import Seal

    keeper = core.make_keeper(nothing_to_show, command=True)
    keeper.unlock(Seal(secret_key(core.settings)))
    async with keeper.borrowing() as machine:
        names = await setup.recover(machine.device, keeper.server, given)
        report = await setup.report(machine.device, keeper.server)
    note(f"Taken out of secret storage: {', '.join(names)}.")
    return _tell(report)


def nothing_to_show(_: str) -> None:
    """Nothing is made that would have a recovery key."""


def _tell(report: "Report") -> int:
    from flowbridge.encryption.setup import HINTS

    hint = HINTS[report.standing]
    note(f"Device {report.device_id} of {report.user_id} is {report.standing}{f': {hint}' if hint else ''}.")
    return 0 if report.standing == "signed" else FAILED


async def _status(core: Core, *, in_json: bool) -> int:
    from flowbridge.encryption import setup
    from flowbridge.encryption.sealing import Seal

    bot = await core.bot.caller()
    assert bot is not None
    account = account_of(bot.user_id)
    stored = await core.database.read(partial(crypto.device, account=account))
    if stored is None:
        say("there is no device yet: `flowbridge serve` makes it where FLOWBRIDGE_ENCRYPTED_ROOMS=encrypt, or `setup`")
        return FAILED
    server = core.make_keeper(nothing_to_show, command=True).server
    report = await setup.report_of(stored, core.database, Seal(secret_key(core.settings)), server)
    owner = await core.database.read(partial(crypto.owner, account=account))
    held: dict[str, Any] = await core.database.read(partial(crypto.held, account=account))
    found = {**asdict(report), "held_by": owner, "in_use": bot.device_id == stored.device_id, **held}
    if in_json:
        print(as_json(found))
    else:
        for name, value in found.items():
            shown = {"True": "yes", "False": "no", "None": "nobody", "": "-"}.get(str(value), str(value))
            print(f"{name.replace('_', ' '):16} {printable(shown)}")
    if not found["in_use"]:
        note(f"The token is of device {bot.device_id}: at its next start the bridge makes that one its device.")
    return 0 if report.standing == "signed" else FAILED
