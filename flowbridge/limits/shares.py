"""How much of a bound one caller may take, so that the rest stays for others.

A fixed quarter would leave nothing to a fifth caller, and an account costs nothing where anyone may register. So each
caller may take a part of what the others have left, and a smaller part the less that is: with `most` = 1/2 the first
takes half of the bound, the second a sixth, the third a twelfth, and n of them leave 1/(n + 1) of it free.
"""

import math
from collections import Counter
from collections.abc import Mapping


class Share:
    """One bound. `most`: the fraction of it that one caller may take while there is no other; 1: all of it.

    `reserved`: what is taken and counts for no caller. For one event loop.
    """

    def __init__(self, limit: float, most: float) -> None:
        self.most = most
        self.total = 0
        self.reserved = 0
        self._weight = most / (1 - most) if most < 1 else math.inf
        self._held: dict[str, int] = {}
        self._changes: Counter[str] | None = None  # since `begin`
        self.limit = limit

    @property
    def limit(self) -> float:
        return self._limit

    @limit.setter
    def limit(self, limit: float) -> None:
        self._limit = limit
        # As long as no more than `easy` is taken in all, no caller can be beyond its share: the total that equals
        # `threshold(total)`. Most acceptances are decided by this one comparison.
        weight = self._weight
        part = 1.0
        if weight < math.inf:
            part = (3 * weight + 1 - math.sqrt((3 * weight + 1) ** 2 - 8 * weight * weight)) / (4 * weight)
        self.easy = math.floor(part * limit) if limit < math.inf else limit

    @property
    def free(self) -> float:
        return self._limit - self.reserved - self.total

    def of(self, caller: str) -> int:
        """What a caller holds."""
        return self._held.get(caller, 0)

    def callers(self) -> list[str]:
        """The callers that hold something."""
        return list(self._held)

    def threshold(self, others: float) -> float:
        """What one caller may hold while others hold this much."""
        left = max(0.0, self._limit - others)
        if self._weight is math.inf or not left:
            return left
        part = self._weight * left / self._limit
        return round(left * part / (1 + part), 6)  # 24.999999999999996 would be one less

    def is_full(self, amount: int = 1) -> bool:
        return amount > self.free

    def takes(self, caller: str, amount: int = 1) -> bool:
        """Whether a caller may take this much more. One that holds nothing may, as long as it fits."""
        taken = self.reserved + self.total
        if taken + amount <= self.easy:
            return True
        if taken + amount > self._limit:
            return False
        held = self._held.get(caller)
        return held is None or held + amount <= self.threshold(taken - held)

    def add(self, caller: str, amount: int = 1) -> None:
        self._held[caller] = self._held.get(caller, 0) + amount
        self.total += amount
        if self._changes is not None:
            self._changes[caller] += amount

    def remove(self, caller: str, amount: int = 1) -> None:
        left = self._held.get(caller, 0) - amount
        if left > 0:
            self._held[caller] = left
            self.total -= amount
        else:
            self.total -= self._held.pop(caller, 0)
        if self._changes is not None:
            self._changes[caller] -= amount

    def begin(self) -> None:
        """What is held is about to be counted: remember what changes from here on, for `learn`."""
        self._changes = Counter()

    def found(self, caller: str, amount: int = 1) -> None:
        """This was taken since `begin`, and is in the count all the same."""
        if self._changes is not None:
            self._changes[caller] -= amount

    def learn(self, held: Mapping[str, int]) -> None:
        """Take over a count: what was held at `begin`, and what was `found` since."""
        changes, self._changes = self._changes or Counter(), None
        self._held = {caller: amount for caller, amount in held.items() if amount > 0}
        self.total = sum(self._held.values())
        for caller, change in changes.items():
            if change > 0:
                self.add(caller, change)
            else:
                self.remove(caller, -change)
