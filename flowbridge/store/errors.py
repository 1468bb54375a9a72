"""What can be wrong with the store."""

from flowbridge.errors import MatrixError, Unavailable

MISSING_RETRY_MS = 10_000  # somebody has to put the store's file back


class StoreError(Exception):
    """The store cannot be used; one line."""


class StoreAbsent(StoreError):
    """There is none yet, or it is not here."""


class StoreInUse(StoreError):
    """Another process has it: SQLite's file belongs to one."""


class StoreFull(Unavailable):
    """Back-pressure: nothing more is taken just now."""


class ShareTaken(StoreFull):
    """A caller has its share of a bound, and has to wait until some of it is settled. Others are not affected."""

    errcode = "M_LIMIT_EXCEEDED"


class RoomShareTaken(StoreFull):
    """Likewise of one room: the same caller may go on in others."""

    errcode = "M_LIMIT_EXCEEDED"


class StoreUnavailable(Unavailable):
    """The database does not answer, or its disk is full."""


class StoreUnsure(StoreUnavailable):
    """Nor does it say whether it has taken this: its answer to a commit got lost.

    Without Retry-After: sent again without a key it may be there twice.
    """

    status = 504

    def __init__(self, why: str) -> None:
        MatrixError.__init__(
            self, f"the store may have taken this, and does not say so: {why}; an Idempotency-Key or txnId finds out"
        )
