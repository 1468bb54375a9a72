"""What strangers send that is wrong, in the log: some lines a minute of each kind, however much they send."""

import time
from collections.abc import Callable

from flowbridge import log

MOST = 10  # lines of one kind …
SECONDS = 60.0  # … in so long; the next one after that says how many were left out


class Complaints:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # action → since when, and how many; actions are ours: few

    def warn(self, action: str, **fields: object) -> None:
        now = self._clock()
        since, number = self._said.get(action, (now, 0))
        if now - since >= SECONDS:
            if number > MOST:
                fields["left_out"] = number - MOST
            since, number = now, 0
        self._said[action] = since, number + 1
        if number < MOST:
            log.warning(action, **fields)


warn = Complaints().warn
