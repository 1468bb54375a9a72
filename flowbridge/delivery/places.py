"""The places for requests to the homeserver, which accounts share.

First come, first served would let an account with a thousand rooms hold all places, with a thousand requests before the
next account's first one. Here accounts that wait take turns, and none has all the places: another one that comes finds
one at once.
"""

import asyncio
from collections import Counter, OrderedDict


class Places:
    """`number` of them, `each` for one account at most. To be used on one event loop."""

    def __init__(self, number: int, each: int) -> None:
        self._free = number
        self._each = each
        self._held: Counter[str] = Counter()
        self._queue: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()  # the next one first

    def one(self, account: str) -> "_Place":
        """`async with places.one(account):` waits for a place, and holds it."""
        return _Place(self, account)

    @property
    def is_idle(self) -> bool:
        """Whether no request holds a place, or waits for one."""
        return not (self._held or self._queue)

    def _finds(self, account: str) -> bool:
        """Whether there is a place at once, which is taken then."""
        found = self._free > 0 and self._may_have_more(account)
        if found and (not self._queue or not any(map(self._may_have_more, self._queue))):
            self._take(account)
            return True
        return False

    async def _enter(self, account: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.setdefault(account, OrderedDict())[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(account)
            else:
                self._forget(account, turn)
            raise

    def _may_have_more(self, account: str) -> bool:
        return self._held[account] < self._each

    def _take(self, account: str) -> None:
        self._free -= 1
        self._held[account] += 1

    def _leave(self, account: str) -> None:
        self._free += 1
        self._held[account] -= 1
        if not self._held[account]:
            del self._held[account]
        while self._free and (found := self._next()) is not None:
            account, turn = found
            if not turn.done():
                self._take(account)
                turn.set_result(None)

    def _next(self) -> "tuple[str, asyncio.Future[None]] | None":
        """Whose turn it is; None when no account that waits may have another place."""
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


class _Place:
    __slots__ = ("_account", "_places")

    def __init__(self, places: Places, account: str) -> None:
        self._places = places
        self._account = account

    async def __aenter__(self) -> None:
        if not self._places._finds(self._account):
            await self._places._enter(self._account)

    async def __aexit__(self, *_: object) -> None:
        self._places._leave(self._account)
