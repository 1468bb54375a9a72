"""The worker: every accepted event reaches its room once, in order."""

from flowbridge.delivery.courier import Courier

__all__ = ["Courier"]
