"""Telling the service manager that the bridge serves, lives and stops: sd_notify(3), for systemd's `Type=notify`."""

import contextlib
import os
import socket
import time


class ServiceManager:
    """Who started this process, if it asked to be told (NOTIFY_SOCKET, WATCHDOG_USEC); else nobody.

    Its children are not told of it. What cannot be said is dropped: the manager then sees to it by its time-outs.
    """

    def __init__(self) -> None:
        path = os.environ.pop("NOTIFY_SOCKET", "")
        watched = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = os.environ.pop("WATCHDOG_USEC", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._every = int(usec) / 2e6 if watched and usec.isascii() and usec.isdecimal() else 0.0
        self._said_at = -self._every

    def ready(self, url: str) -> None:
        self._say(f"READY=1\nSTATUS=Serving on {url}")

    def stopping(self) -> None:
        self._say("STOPPING=1\nSTATUS=Ending requests and deliveries in flight")

    def alive(self) -> None:
        """To be called by what must not hang: says so twice in the time that the manager waits for it."""
        now = time.monotonic()
        if self._every and now - self._said_at >= self._every:
            self._said_at = now
            self._say("WATCHDOG=1")

    def _say(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            manager.sendto(text.encode(), self._address)
