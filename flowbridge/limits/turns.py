"""What callers wait for, in an order in which they take turns, however much each of them has asked for."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """One item of each caller after another; those of one caller in the order in which they came.

    A caller that had nothing waiting comes first, as in FQ-CoDel (RFC 8290 §4.2), once in each round: until the others
    had their turn, its place is kept, if only to be passed over.
    """

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._waiting = 0

    def __bool__(self) -> bool:
        return self._waiting > 0

    def of(self, caller: str) -> int:
        """How many items of a caller wait."""
        queue = self._queues.get(caller)
        return len(queue) if queue is not None else 0

    def add(self, caller: str, item: T) -> None:
        queue = self._queues.get(caller)
        if queue is None:
            queue = self._queues[caller] = deque()
            self._queues.move_to_end(caller, last=False)
        queue.append(item)
        self._waiting += 1

    @property
    def next(self) -> T:
        """The item whose turn it is, which stays. Raises IndexError when there is none."""
        while self._queues:
            caller, queue = next(iter(self._queues.items()))
            if queue:
                return queue[0]
            del self._queues[caller]
        raise IndexError("nothing waits")

    def take(self) -> T:
        """The item whose turn it is, which leaves. Raises IndexError when there is none."""
        item = self.next
        caller = next(iter(self._queues))
        self._queues[caller].popleft()
        self._queues.move_to_end(caller)
        self._waiting -= 1
        if not self._waiting:
            self._queues.clear()
        return item
