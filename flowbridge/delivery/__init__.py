"""Delivery: every accepted event reaches its room once, in order."""

from flowbridge.delivery.beside import Beside
from flowbridge.delivery.worker import Worker

__all__ = ["Beside", "Worker"]
