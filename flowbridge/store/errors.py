"""What can be wrong with the store."""

from flowbridge.errors import Unavailable

MISSING_RETRY_MS = 10_000  # somebody has to put the store's file back


class StoreError(Exception):
    """The store cannot be used; one line."""


class StoreAbsent(StoreError):
    """There is none yet, or it is not here."""


class StoreFull(Unavailable):
    """Back-pressure: nothing more is taken just now."""


class StoreUnavailable(Unavailable):
    """The database does not answer, or its disk is full."""
