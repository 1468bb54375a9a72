"""A line every few seconds during a run: its progress, and what was done to the bridge."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.monkey import Monkey


class Progress:
    """`accepted`: events so far; `log`: the homeserver's, a line for each event."""

    def __init__(self, accepted: Callable[[], int], log: Path, monkey: Monkey) -> None:
        self._accepted = accepted
        self._log = log
        self._monkey = monkey
        self._began = time.monotonic()
        self._at = self._seen = 0

    async def show(self, every: float) -> None:
        """For ever, until cancelled."""
        while True:
            await asyncio.sleep(every)
            print(self.line(), flush=True)

    def line(self) -> str:
        self._monkey.measure()
        accepted, seen = self._accepted(), self._count()
        did = ", ".join(f"{what} {times}" for what, times in self._monkey.counts.items())
        return (
            f"  {time.monotonic() - self._began:5.0f} s  accepted {accepted:,}  in their rooms {seen:,}  "
            f"queued {max(0, accepted - seen):,}  {self._monkey.rss_mb:.0f} MB  {did}".rstrip()
        )

    def _count(self) -> int:
        """Lines of the log."""
        with self._log.open("rb") as file:
            file.seek(self._at)
            while data := file.read(1 << 20):
                self._seen += data.count(b"\n")
                self._at += len(data)
        return self._seen
