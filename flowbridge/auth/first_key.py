"""The first API key, which `serve` makes, so that a fresh bridge with a bot account can be called at all."""

import contextlib
import os
import sys
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from flowbridge import log
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys
from flowbridge.store.engine import reason


def make(settings: Settings, database: Database) -> None:
    """Make a key with all rights, when there is a bot account to act as and there never was a key.

    It is shown once on a terminal, otherwise written to a 0600 file that the log names. Where that fails no key is
    made, and the log says so.
    """
    if settings.api_keys or not settings.has_bot:
        return
    try:
        _make(database, path_beside(settings))
    except FileExistsError as error:
        _not_made(f"{error.filename} is there already, and is not overwritten")
    except (OSError, SQLAlchemyError) as error:
        _not_made(reason(error))


def path_beside(settings: Settings) -> Path:
    """The file for the key: beside an SQLite database, otherwise in the working directory."""
    return Path(f"{settings.database_file or 'flowbridge'}.first-key")


def _make(database: Database, path: Path) -> None:
    secret = api_keys.new_secret()
    with contextlib.ExitStack() as undo:
        with database.engine.begin() as connection:  # shown before the commit: a committed key cannot be lost
            if not api_keys.add_first(connection, secret):
                return
            if sys.stderr.isatty():
                _show(secret)
            else:
                _write(path, secret, undo)
        undo.pop_all()


def _show(secret: str) -> None:
    print(
        f"\nThe first API key, for all rooms and event types, with admin. It is shown only now:\n\n    {secret}\n\n"
        "Callers send it as `X-API-Key`. `flowbridge keys` makes, lists and revokes keys.\n",
        file=sys.stderr,
        flush=True,
    )


def _write(path: Path, secret: str, undo: contextlib.ExitStack) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    undo.callback(path.unlink)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secret}\n")
        file.flush()
        os.fsync(descriptor)
    log.info("first_key", file=str(path), hint="an API key with admin: keep it elsewhere, then delete this file")


def _not_made(error: str) -> None:
    log.warning("first_key_not_made", error=error, hint="`flowbridge keys create` makes a key")
