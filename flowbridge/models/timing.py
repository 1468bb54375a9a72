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
    first_pause: float = 0.5  # before an event is tried again; doubled each time …
    max_pause: float = 60.0  # … up to this
    absent_pauses: tuple[float, ...] = (
        60.0,
        300.0,
        900.0,
    )  # likewise, outside the room, in turn
    rest_pause: float = 5.0  # for a longer pause than this a lane is given back
    poll_seconds: float = 0.5  # between two looks for lanes to claim
    idle_seconds: float = 20.0  # after which a lane is given back
    max_rest: float = 30.0  # of the lanes of an account that is paused
    wake_seconds: float = 5.0  # a lane that rests is not woken for callers more often than this …
    absent_wake_seconds: float = 2.0  # … nor, where it waits for an invitation, than this
    yield_seconds: float = 3.0  # for which a lane is left to a command that asks for it
    token_pause: float = 5.0  # of an account of which no token is accepted
    halt_pauses: tuple[float, ...] = (5.0, 15.0, 60.0, 300.0, 600.0)  # of an account that is refused, in turn
    halt_retry_seconds: float = 2.0  # between two early tries of such an account, for callers who wait
    first_probe_pause: float = 0.5  # before the homeserver is asked whether it is back; doubled each time …
    max_probe_pause: float = 10.0  # … up to this
    plain_seconds: float = 10.0  # for which a room that was found plain is taken to be so
    recent_seconds: float = 1.0  # for which what was read of the events sent last counts
    rewrite_seconds: float = 1.0  # until outcomes that the store has refused are written again
    piece_seconds: float = 0.02  # that a piece of a census reads the store

    # homeserver and live
    connect_seconds: float = 5.0  # to connect to the homeserver
    address_refresh_seconds: float = 60.0  # between two looks at an s3:// or file:// address
    relay_turn_seconds: float = 5.0  # to wait for a place: a page of pictures asks for more than a share at once
    upload_stall_seconds: float = 60.0  # for the homeserver to take a piece of a body
    linger_seconds: float = 10.0  # for which a feed outlives its last listener: most come back
    live_retry_seconds: float = 0.25  # after a failed attempt; doubled while no attempt gets any further
    empty_poll_seconds: float = 0.5  # before the next long poll, where one ended at once with nothing new

    # outbound
    fetch_seconds: float = 60.0  # for which the server of a file's URL is waited for, in all
    fetch_silence_seconds: float = 10.0  # for its server to answer, and for each further piece

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
    refused_seconds: float = 1.0  # until a refused call is in the delivery log
    kept_seconds: float = 5.0  # until requests to hooks are kept for their owner: of a flood the last ones are written
    give_up_seconds: float = 60.0  # also after a start: what the bridge's own outage made too old may still be sent
    forget_seconds: float = 600.0
    upkeep_retry_seconds: float = 10.0  # after maintenance work that failed

    render_seconds: float = 10.0  # for a text to be rendered on a busy machine; of the processor it gets one second
    invitation_seconds: float = 4.0  # between two looks for invitations of the bot
    invitation_lease_seconds: float = 90.0  # for which one of several replicas looks for them
    join_pauses: tuple[float, ...] = (5.0, 30.0, 120.0, 600.0, 3_600.0)  # after a join that failed, in turn

    # encryption
    crypto_sync_seconds: float = 4.0  # between two syncs of a device that sends nothing
    crypto_fresh_seconds: float = 1.0  # before a send a sync must have begun no longer ago: new devices are known then
    crypto_ask_seconds: float = 2.0  # between two looks whether a command asks for the device

    # store
    sqlite_busy_seconds: float = 5.0  # for which SQLite waits for a lock on its file
    sqlite_locked_seconds: float = 5.0  # for which opening is retried where SQLite does not wait
    postgres_start_seconds: float = 30.0  # for a PostgreSQL that starts together with us, as in docker-compose
    postgres_poll_seconds: float = 1.0
    # A replica that was stopped in the middle of a transaction must not hold its locks for ever.
    idle_transaction_seconds: float = 5.0
    store_retry_seconds: float = 10.0  # for which a commit is retried while the database is away, or locked
    listen_retry_seconds: float = 5.0  # until PostgreSQL's notifications are listened to again
    file_check_seconds: float = 2.0  # between two checks of all SQLite files; each commit checks what it went into

    # web
    keep_alive_seconds: int = 75  # nginx's; with uvicorn's 5 s one in 12 requests of a Node agent each 5.0 s failed
    stop_seconds: int = 10  # for requests in flight when the bridge stops
    head_seconds: float = 10.0  # for a request line and its headers to arrive
    body_seconds: float = 20.0  # for a body to arrive, or for each further part of it
    hang_up_poll_seconds: float = 5.0  # between two checks for a hang-up, while a connection is not read
    answer_stall_seconds: float = 60.0  # for the caller to take a piece of a streamed answer
    readiness_seconds: float = 1.0  # that /readyz and /versions keep what the homeserver and the store's file said
    answer_silence_seconds: float = 300.0  # for the homeserver to say anything: a join across servers takes minutes
