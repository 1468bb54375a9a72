"""What is accepted is written down here first, and stays until it is settled."""

from flowbridge.store.database import Database
from flowbridge.store.errors import StoreAbsent, StoreError, StoreFull, StoreUnavailable, StoreUnsure
from flowbridge.store.outbox import Fence, Row

__all__ = ["Database", "Fence", "Row", "StoreAbsent", "StoreError", "StoreFull", "StoreUnavailable", "StoreUnsure"]
