"""A bounded cache, whose entries may expire."""

import math
import time
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar, overload

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
D = TypeVar("D")


class Cache(Generic[K, V]):
    """At most `size` entries; the one written longest ago is evicted. An entry expires `seconds` after its write.

    With a `weight` for each entry, `size` bounds their sum, for example in bytes.
    """

    def __init__(self, size: int, seconds: float = math.inf) -> None:
        self._size = size
        self._seconds = seconds
        self._entries: dict[K, tuple[V, float, int]] = {}
        self._weight = 0

    @overload
    def get(self, key: K) -> V | None: ...
    @overload
    def get(self, key: K, default: D) -> V | D: ...
    def get(self, key: K, default: D | None = None) -> V | D | None:
        """The value, unless it has expired."""
        entry = self._entries.get(key)
        return default if entry is None or entry[1] <= time.monotonic() else entry[0]

    def put(self, key: K, value: V, *, seconds: float | None = None, weight: int = 1) -> V:
        """Write an entry and return its value. `seconds`: where this entry expires earlier or later than others."""
        self.pop(key)
        lasts = self._seconds if seconds is None else seconds
        self._entries[key] = (value, time.monotonic() + lasts, weight)
        self._weight += weight
        while self._weight > self._size:
            self.pop(next(iter(self._entries)))
        return value

    def pop(self, key: K, default: D | None = None) -> V | D | None:
        """Remove an entry and return its value, unless it had expired."""
        value = self.get(key, default)
        if (entry := self._entries.pop(key, None)) is not None:
            self._weight -= entry[2]
        return value

    def clear(self) -> None:
        self._entries.clear()
        self._weight = 0

    def items(self) -> Iterator[tuple[K, V]]:
        """The entries that have not expired, as they are now: the cache may be changed meanwhile."""
        now = time.monotonic()
        return iter([(key, value) for key, (value, ends, _) in self._entries.items() if ends > now])

    def __contains__(self, key: K) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry[1] > time.monotonic()

    def __len__(self) -> int:
        """How many entries there are, expired ones included."""
        return len(self._entries)
