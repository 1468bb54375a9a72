"""Live events: one long poll per account, told to any number of listeners."""

from flowbridge.live.frames import Wish
from flowbridge.live.listener import Listener
from flowbridge.live.registry import Live

__all__ = ["Listener", "Live", "Wish"]
