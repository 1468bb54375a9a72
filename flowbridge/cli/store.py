"""The store as a command uses it: opened for a moment, perhaps beside a server."""

import contextlib
from collections.abc import Iterator

from sqlalchemy.exc import SQLAlchemyError

from flowbridge import log
from flowbridge.settings import Settings
from flowbridge.store import Database, StoreError
from flowbridge.store.engine import name, reason


@contextlib.contextmanager
def opened(settings: Settings, *, make: bool = False) -> Iterator[Database]:
    """The store. `make`: also when there is none yet. Raises StoreError."""
    log.setup(settings.log_format, "warning")
    database = Database(settings.database_url.get_secret_value())
    database.open(shared=True, make=make)
    try:
        yield database
    except SQLAlchemyError as error:
        raise StoreError(f"{name(database.url)} cannot be used: {reason(error)}") from None
    finally:
        database.engine.dispose()
