"""`flowbridge device export-keys` and `import-keys`: room keys in the file that clients write and read, too.

The passphrase is asked for, or read from a file or standard input: what stands in a command line, other users see.
"""

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer

from flowbridge.auth.tokens import secret_key
from flowbridge.bridge import Core
from flowbridge.cli import FAILED, Usage
from flowbridge.cli.device import nothing_to_show, require_library, run
from flowbridge.cli.terminal import note, printable, say
from flowbridge.settings import Settings
from flowbridge.store.accounts import account_of

MAX_PASSPHRASE = 4_096  # bytes of a file


def export_keys(settings: Settings, path: Path, passphrase_file: Path | None) -> int:
    """Write all room keys to a new file, 0600; returns the exit code."""
    if path.exists():
        raise Usage(f"{path} exists already")
    passphrase = _passphrase(passphrase_file, twice=True)
    return run(settings, partial(_export, path=path, passphrase=passphrase))


def import_keys(settings: Settings, path: Path, passphrase_file: Path | None) -> int:
    """Read room keys from a file; returns the exit code."""
    require_library()
    from flowbridge.encryption import key_file
    from flowbridge.encryption.olm import CryptoError

    text = _read(path)
    passphrase = _passphrase(passphrase_file, twice=False)
    try:
        values = key_file.read(text, passphrase)
    except CryptoError as error:
        say(printable(str(error)))
        return FAILED
    return run(settings, partial(_import, values=values))


def _read(path: Path) -> str:
    from flowbridge.encryption.key_file import MAX_BYTES

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Usage(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise Usage(f"{path} has more than {MAX_BYTES >> 20} MiB: it is not a file of room keys that can be read")
    return raw.decode("utf-8", "replace")


def _passphrase(path: Path | None, *, twice: bool) -> str:
    if path is not None:
        try:
            with path.open("rb") as file:
                given = file.read(MAX_PASSPHRASE).decode("utf-8", "replace").strip("\r\n")
        except OSError as error:
            raise Usage(f"{path} cannot be read: {error.strerror}") from None
    elif sys.stdin.isatty():
        given = str(typer.prompt("Passphrase of the file", hide_input=True, confirmation_prompt=twice, err=True))
    else:
        given = sys.stdin.readline(MAX_PASSPHRASE).strip("\r\n")
    if not given:
        raise Usage("a file of room keys has a passphrase: it is asked for, or read on standard input")
    return given


def _write(path: Path, text: str) -> None:
    """A new file, whole or not at all. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


async def _export(core: Core, *, path: Path, passphrase: str) -> int:
    from flowbridge.encryption import key_file, room_keys
    from flowbridge.encryption.sealing import Seal

    bot = await core.bot.caller()
    assert bot is not None
    keys = await room_keys.exported(core.database, Seal(secret_key(core.settings)), account_of(bot.user_id))
    try:
        _write(path, key_file.write(keys, passphrase))
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}")
        return FAILED
    note(f"{len(keys)} room keys are in {path}.")
    return 0


async def _import(core: Core, *, values: list[Any]) -> int:
    from flowbridge.encryption import room_keys
    from flowbridge.encryption.sealing import Seal

    keeper = core.make_keeper(nothing_to_show, command=True)
    keeper.unlock(Seal(secret_key(core.settings)))
    async with keeper.borrowing() as machine:
        taken, wrong = await room_keys.imported(machine.device, values)
    note(f"{taken} room keys were read.")
    if wrong:
        say(f"{len(wrong)} were not taken, the first since: {printable(wrong[0])[:300]}")
    return FAILED if wrong else 0
