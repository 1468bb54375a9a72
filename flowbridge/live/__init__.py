"""Live events: one long poll per account, told to any number of listeners."""

from flowbridge.live.feeds import Live
from flowbridge.live.frames import Wish
from flowbridge.live.listener import Listener

__all__ = ["Listener", "Live", "Wish"]
