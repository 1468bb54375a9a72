"""Callers' connections: how many there may be, what share of them one address may hold, and which make room for others.

Kept-alive connections wait 75 s for the next request, so that a caller with many of them could keep all others out.
Where a bound is reached, the connection that has been idle for longest is closed for the new one; only where none is
idle the new one is refused.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from flowbridge import log, metrics
from flowbridge.limits.proxies import network_of

MAX_CONNECTIONS = 4_096
SHARE = 0.5  # of them for one address: two hogs take all, one leaves 2,048 to the others
RESERVED_FILES: Final = 2_432  # that are left to the store, temporary files, and what passes through: 2,304 connections
QUIET_SECONDS: Final = 10.0  # between two lines in the log for the same reason


class Connection(Protocol):
    """What is counted. `make_room` closes it: no request is under way."""

    def make_room(self) -> None: ...


@dataclass(slots=True)
class _Holder:
    """The connections of one address (of IPv6: of one /64, which one subscriber has at least), the proxies' apart."""

    name: str
    open: int = 0
    idle: dict[Connection, None] = field(default_factory=dict)  # the longest idle first


class Connections:
    """`is_proxy`: whether an address carries many callers, and is bounded by the total alone.

    `most`: how many in all, MAX_CONNECTIONS unless given. `files`: the process's limit of open files, if it has one.
    """

    def __init__(self, is_proxy: Callable[[str], bool], *, most: int | None = None, files: int | None = None) -> None:
        self._is_proxy = is_proxy
        self._most = most
        self._files = files - min(RESERVED_FILES, files // 4) if files else None
        self._open: dict[Connection, _Holder] = {}
        self._holders: dict[str, _Holder] = {}
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._refused: dict[str, int] = {}  # since the last line in the log
        self._quiet_until: dict[str, float] = {}

    def admit(self, connection: Connection, address: str, file: int = 0) -> str:
        """Count a new connection, which is idle; or say why it is refused. `file`: its descriptor."""
        is_proxy = self._is_proxy(address)
        name = address if is_proxy else network_of(address)
        holder = self._holders.get(name) or _Holder(name)
        most = self._most or MAX_CONNECTIONS
        share = max(1, int(most * SHARE))
        if not is_proxy and holder.open >= share and not self._evict(holder.idle):
            return self._refuse("address", holder, f"too many connections of {name}: at most {share} at a time")
        if len(self._open) >= most and not self._evict(self._idle):
            return self._refuse("total", holder, "too many connections")
        # The lowest free number is given to each new file: a number near the limit says that nearly all are in use.
        if self._files is not None and file >= self._files and not self._evict(self._idle):
            return self._refuse("files", holder, "too many open files")
        self._holders[name] = holder
        holder.open += 1
        self._open[connection] = holder
        self.rest(connection)
        return ""

    def rest(self, connection: Connection) -> None:
        """No request is under way."""
        holder = self._open.get(connection)
        if holder is not None:
            holder.idle[connection] = self._idle[connection] = None

    def wake(self, connection: Connection) -> None:
        """A request begins."""
        if connection in self._idle:
            del self._idle[connection]
            self._open[connection].idle.pop(connection, None)

    def drop(self, connection: Connection) -> None:
        """It has ended; one that was refused was not counted."""
        self.wake(connection)
        holder = self._open.pop(connection, None)
        if holder is not None:
            holder.open -= 1
            if not holder.open:
                del self._holders[holder.name]

    def __len__(self) -> int:
        return len(self._open)

    def _evict(self, idle: dict[Connection, None]) -> bool:
        """Close the one that has been idle for longest, if any."""
        for connection in idle:
            self.drop(connection)
            connection.make_room()
            metrics.connections_evicted.inc()
            return True
        return False

    def _refuse(self, bound: str, holder: _Holder, error: str) -> str:
        metrics.count(metrics.connections_refused, bound)
        self._refused[bound] = self._refused.get(bound, 0) + 1
        now = time.monotonic()
        if now >= self._quiet_until.get(bound, 0.0):
            self._quiet_until[bound] = now + QUIET_SECONDS
            largest = max(self._holders.values(), key=lambda other: other.open, default=holder)
            shown = holder if bound == "address" else largest
            fields: dict[str, object] = {
                "bound": bound,
                "refused": self._refused.pop(bound),
                "open": len(self._open),
            }
            fields |= {"client": shown.name, "of_client": shown.open}
            if bound == "address":
                fields["hint"] = "a proxy is not one caller: FLOWBRIDGE_TRUSTED_PROXIES names it"
            log.warning("connections_refused", **fields)
        return error
