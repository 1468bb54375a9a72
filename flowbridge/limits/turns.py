"""What callers wait for, in an order in which they take turns, however much each of them has asked for."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """One item of each caller after another; those of one caller in the order in which they came."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()  # none is empty

    def __bool__(self) -> bool:
        return bool(self._queues)

    def of(self, caller: str) -> int:
        """How many items of a caller wait."""
        queue = self._queues.get(caller)
        return len(queue) if queue is not None else 0

    def add(self, caller: str, item: T) -> None:
        queue = self._queues.get(caller)
        if queue is None:
            queue = self._queues[caller] = deque()
        queue.append(item)

    @property
    def next(self) -> T:
        """The item whose turn it is, which stays. Raises StopIteration when there is none."""
        return next(iter(self._queues.values()))[0]

    def take(self) -> T:
        """The item whose turn it is, which leaves. Raises KeyError when there is none."""
        caller, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[caller] = queue
        return item
