"""The store's errors."""

from flowbridge.errors import MatrixError, Unavailable

# Commands make no database: a key, or an event, in one that no bridge reads would be lost without a word.
MAKING = (
    "set FLOWBRIDGE_DATABASE_URL as the bridge has it, or run this in the bridge's folder; "
    "`flowbridge serve` and `flowbridge init` make a new database"
)
MISSING_RETRY_MS = 10_000  # the operator has to put the store's file back


class StoreError(Exception):
    """The store cannot be used; one line."""


class StoreAbsent(StoreError):
    """There is no store yet, or it is somewhere else."""


class StoreInUse(StoreError):
    """Another process has it: an SQLite file belongs to one."""


class StoreFull(Unavailable):
    """Back-pressure: nothing more is accepted for now."""


class ShareTaken(StoreFull):
    """A caller holds its share of a bound, and has to wait until some of it is settled. Others are not affected."""

    errcode = "M_LIMIT_EXCEEDED"


class RoomShareTaken(StoreFull):
    """The same in one room: the caller may go on in others."""

    errcode = "M_LIMIT_EXCEEDED"


class StoreUnavailable(Unavailable):
    """The database does not answer, or its disk is full."""


class StoreUnsure(StoreUnavailable):
    """The database may have taken this: its answer to a commit was lost.

    Without Retry-After: repeated without a key, the event may be there twice.
    """

    status = 504

    def __init__(self, why: str) -> None:
        MatrixError.__init__(
            self, f"the store may have taken this, and does not say so: {why}; an Idempotency-Key or txnId finds out"
        )
