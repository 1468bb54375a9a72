"""How long things last: the durations that a test, or a chaos run, has to shorten."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations in seconds, handed down from the composition root. The defaults are what production runs with.

    A duration that no test changes stays a constant beside the code that it is about.
    """

    # delivery

    # homeserver and live

    # auth, limits and services
    clock: Callable[[], float] = time.monotonic
    patience_seconds: float = 0.5  # for a homeserver that hangs, before its last answer counts
    key_lookup_seconds: float = 1.0  # between two reads of the store for API keys that are not known
    key_patience_seconds: float = 2.0  # for a store that hangs
    refusal_seconds: float = 5.0  # how long a refusal is repeated without another look-up
    key_refresh_seconds: float = 1.5  # a revoked API key is refused within 2 s, the read included
    token_idle_seconds: float = 600.0  # how long a token is kept that no queued event needs
    count_seconds: float = 10.0  # between two counts, and two censuses, of what is in the store
    purge_seconds: float = 60.0
    give_up_seconds: float = 60.0  # also after a start: what the bridge's own outage made too old may still be sent
    forget_seconds: float = 600.0
    upkeep_retry_seconds: float = 10.0  # after maintenance work that failed

    # store

    # web
