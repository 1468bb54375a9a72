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
    keep_alive_seconds: int = 75  # nginx's; with uvicorn's 5 s one in 12 requests of a Node agent each 5.0 s failed
    stop_seconds: int = 10  # for requests in flight when the bridge stops
    head_seconds: float = 10.0  # for a request line and its headers to arrive
    body_seconds: float = 20.0  # for a body to arrive, or for each further part of it
    hang_up_poll_seconds: float = 5.0  # between two checks for a hang-up, while a connection is not read
    answer_stall_seconds: float = 60.0  # for the caller to take a piece of a streamed answer
    readiness_seconds: float = 1.0  # that /readyz and /versions keep what the homeserver and the store's file said
    answer_silence_seconds: float = 300.0  # for the homeserver to say anything: a join across servers takes minutes
