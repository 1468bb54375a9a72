"""Live events: one long poll per account, for any number of listeners."""

from flowbridge.live.feeds import Live
from flowbridge.live.frames import EventFilter
from flowbridge.live.listener import Listener

__all__ = ["EventFilter", "Listener", "Live"]
