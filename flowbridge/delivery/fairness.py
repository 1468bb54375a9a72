"""Fairness between accounts, which share the places for requests to the homeserver, and the lanes that a worker holds.

First come, first served would let an account with a thousand rooms take every place, a thousand requests before another
account's first one. Here waiting accounts take turns, and none may hold all places: the next account finds one at once.
"""

import asyncio
from collections import Counter, OrderedDict


def share_of_lanes(held: Counter[str], lanes: int) -> int:
    """How many of all lanes one account may hold, which leaves as many for the next account that comes."""
    return lanes // (len(held) + 1)


class Places:
    """`number` of them, at most `each` for one account. For one event loop."""

    def __init__(self, number: int, each: int) -> None:
        self._free = number
        self._each = each
        self._held: dict[str, int] = {}
        self._queue: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()  # the next one first

    @property
    def is_idle(self) -> bool:
        """Whether no request holds a place or waits for one."""
        return not (self._held or self._queue)

    def finds(self, account: str) -> bool:
        """Take a place if one is free; whether it was. To be followed by `leave`."""
        if not self._free or (self._queue and any(map(self._may_have_more, self._queue))):
            return False
        held = self._held.get(account, 0)
        if held >= self._each:
            return False
        self._free -= 1
        self._held[account] = held + 1
        return True

    async def wait(self, account: str) -> None:
        """Take a place once one is free. To be followed by `leave`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.setdefault(account, OrderedDict())[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(account)
            else:
                self._forget(account, turn)
            raise

    def hold(self, account: str) -> "_Hold":
        """`async with places.hold(account):` waits for a place, and gives it back."""
        return _Hold(self, account)

    def _may_have_more(self, account: str) -> bool:
        return self._held.get(account, 0) < self._each

    def leave(self, account: str) -> None:
        """Give a place back."""
        self._free += 1
        held = self._held[account] - 1
        if held:
            self._held[account] = held
        else:
            del self._held[account]
        while self._queue and self._free and (found := self._next()) is not None:
            account, turn = found
            if not turn.done():
                self._free -= 1
                self._held[account] = self._held.get(account, 0) + 1
                turn.set_result(None)

    def _next(self) -> "tuple[str, asyncio.Future[None]] | None":
        """The next account and its request; None when no waiting account may have another place."""
        for account, turns in self._queue.items():
            if self._may_have_more(account):
                turn, _ = turns.popitem(last=False)
                if turns:
                    self._queue.move_to_end(account)
                else:
                    del self._queue[account]
                return account, turn
        return None

    def _forget(self, account: str, turn: "asyncio.Future[None]") -> None:
        turns = self._queue.get(account)
        if turns is not None and turns.pop(turn, turns) is None and not turns:
            del self._queue[account]


class _Hold:
    __slots__ = ("_account", "_places")

    def __init__(self, places: Places, account: str) -> None:
        self._places = places
        self._account = account

    async def __aenter__(self) -> None:
        if not self._places.finds(self._account):
            await self._places.wait(self._account)

    async def __aexit__(self, *_: object) -> None:
        self._places.leave(self._account)
