"""The store as commands use it: opened for a moment, perhaps beside a running server."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from flowbridge import log
from flowbridge.auth.tokens import known_secret_key
from flowbridge.cli.terminal import note
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database, StoreError
from flowbridge.store.engine import name, place, reason


@contextlib.contextmanager
def opened(
    settings: Settings, *, make: bool = False, tells: bool = False, timing: Timing = Timing()
) -> Iterator[Database]:
    """The store. `make`: create it when there is none. Raises StoreError.

    A terminal is told which one it is, and with `tells` a script, too.
    """
    log.setup(settings.log_format, "warning")
    database = Database(settings.database_url.get_secret_value(), timing=timing)
    database.open(shared=True, make=make)
    database.contents.unlock(partial(known_secret_key, settings))
    if tells or sys.stderr.isatty():
        note(f"The database is {place(database.url)}.")
    try:
        yield database
    except SQLAlchemyError as error:
        raise StoreError(f"{name(database.url)} cannot be used: {reason(error)}") from None
    finally:
        database.engine.dispose()


def create(settings: Settings) -> None:
    """Create it, unless it exists. Raises StoreError."""
    with opened(settings, make=True, tells=True):
        pass
