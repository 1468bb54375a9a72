"""How long things last: the durations that a test, or a chaos run, has to shorten."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations in seconds, handed down from the composition root. The defaults are what production runs with.

    A duration that no test changes stays a constant beside the code that it is about.
    """

    # delivery

    # homeserver and live

    # auth, limits and services

    # store

    # web
