"""The only SQL: accepted events are written down here first, and stay until they are settled."""

from flowbridge.store.database import Database
from flowbridge.store.errors import StoreAbsent, StoreError, StoreFull, StoreUnavailable, StoreUnsure
from flowbridge.store.leases import Fence
from flowbridge.store.outbox import Row

__all__ = ["Database", "Fence", "Row", "StoreAbsent", "StoreError", "StoreFull", "StoreUnavailable", "StoreUnsure"]
