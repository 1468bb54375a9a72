"""Callers' connections: how many there may be, the share of one address, and which of them is evicted for a new one.

A connection is kept alive for 75 s after its last request, so that one caller with many of them could keep all others
out. At a bound, the connection that has been idle longest is closed for the new one. Without an idle one, the new one
is refused.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from flowbridge import log, metrics
from flowbridge.limits.proxies import network_of

MAX_CONNECTIONS: Final = 4_096
SHARE: Final = 0.5  # of them for one address: two hogs take all, one leaves 2,048 to the others
RESERVED_FILES: Final = 2_432  # for the store, temporary files, and 2,304 connections of what passes through
QUIET_SECONDS: Final = 10.0  # between two log lines for the same bound


class Connection(Protocol):
    """What is counted. `evict` closes it; no request is in flight on it then."""

    def evict(self) -> None: ...


@dataclass(slots=True)
class _Holder:
    """The connections of one address, or of one IPv6 /64, since a subscriber has at least that. A proxy is its own."""

    name: str
    open: int = 0
    idle: dict[Connection, None] = field(default_factory=dict)  # the longest idle first


class Connections:
    """`is_proxy`: whether an address carries many callers, so that only the total bounds it.

    `files`: the process's limit of open files, if it has one.
    """

    def __init__(
        self, is_proxy: Callable[[str], bool], *, most: int = MAX_CONNECTIONS, files: int | None = None
    ) -> None:
        self._is_proxy = is_proxy
        self._most = most
        self._files = files - min(RESERVED_FILES, files // 4) if files else None
        self._open: dict[Connection, _Holder] = {}
        self._holders: dict[str, _Holder] = {}
        self._idle: dict[Connection, None] = {}  # the longest idle first
        self._refused: dict[str, int] = {}  # by bound, since its last log line
        self._quiet_until: dict[str, float] = {}

    def admit(self, connection: Connection, address: str, file: int = 0) -> str:
        """Count a new connection, idle at first, or return why it is refused. `file`: its descriptor."""
        is_proxy = self._is_proxy(address)
        name = address if is_proxy else network_of(address)
        holder = self._holders.get(name) or _Holder(name)
        share = max(1, int(self._most * SHARE))
        if not is_proxy and holder.open >= share and not self._evict(holder.idle):
            return self._refuse("address", holder, f"too many connections of {name}: at most {share} at a time")
        if len(self._open) >= self._most and not self._evict(self._idle):
            return self._refuse("total", holder, "too many connections")
        # A new file gets the lowest free number: one near the limit says that nearly all are in use.
        if self._files is not None and file >= self._files and not self._evict(self._idle):
            return self._refuse("files", holder, "too many open files")
        self._holders[name] = holder
        holder.open += 1
        self._open[connection] = holder
        self.mark_idle(connection)
        return ""

    def mark_idle(self, connection: Connection) -> None:
        """No request is in flight."""
        holder = self._open.get(connection)
        if holder is not None:
            holder.idle[connection] = self._idle[connection] = None

    def mark_busy(self, connection: Connection) -> None:
        """A request begins."""
        if connection in self._idle:
            del self._idle[connection]
            self._open[connection].idle.pop(connection, None)

    def remove(self, connection: Connection) -> None:
        """It has ended. One that was refused was not counted."""
        self.mark_busy(connection)
        holder = self._open.pop(connection, None)
        if holder is not None:
            holder.open -= 1
            if not holder.open:
                del self._holders[holder.name]

    def __len__(self) -> int:
        return len(self._open)

    def _evict(self, idle: dict[Connection, None]) -> bool:
        """Close the one that has been idle longest, if any."""
        connection = next(iter(idle), None)
        if connection is None:
            return False
        self.remove(connection)
        connection.evict()
        metrics.connections_evicted.inc()
        return True

    def _refuse(self, bound: str, holder: _Holder, error: str) -> str:
        metrics.count(metrics.connections_refused, bound)
        self._refused[bound] = self._refused.get(bound, 0) + 1
        now = time.monotonic()
        if now >= self._quiet_until.get(bound, 0.0):
            self._quiet_until[bound] = now + QUIET_SECONDS
            fields = {"bound": bound, "refused": self._refused.pop(bound), "open": len(self._open)}
            if bound != "address":
                holder = max(self._holders.values(), key=lambda other: other.open, default=holder)
            fields |= {"client": holder.name, "of_client": holder.open}
            if bound == "address":
                fields["hint"] = "a proxy is not one caller: FLOWBRIDGE_TRUSTED_PROXIES names it"
            log.warning("connections_refused", **fields)
        return error
