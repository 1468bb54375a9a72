"""`flowbridge deliveries purge`: delete settled or queued events, whether the server runs or not."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from sqlalchemy.sql import ColumnElement

from flowbridge.cli import FAILED, Usage
from flowbridge.cli.selection import ago, located, select
from flowbridge.cli.store import opened
from flowbridge.cli.terminal import as_text, confirmed, printable, progress, say
from flowbridge.services.delivery_views import REFUSED
from flowbridge.settings import Settings
from flowbridge.store import Database, abandoned, clock, delivery_log, refused, retention
from flowbridge.store.delivery_log import Whose
from flowbridge.store.slices import Slices

SHOWN = 5  # callers that a question names
LANES = 100  # that are emptied, or asked for, at once
ASK_SECONDS = 0.2
MARGIN_SECONDS = 5.0  # beyond a lease, and beyond a request, after which a bridge has given lanes back


def purge(settings: Settings, wanted: Sequence[str], older_than: str, *, yes: bool) -> int:
    """Delete settled deliveries; returns the exit code: 1 when it is not confirmed. Raises Usage."""
    chosen = select(state=wanted).states or ("sent", "dead", REFUSED)
    if "queued" in chosen:
        raise Usage("--state: only what is sent, dead or refused can be purged so; --queued is for what is queued")
    before = ago(older_than, "--older-than") if older_than else clock.now_ms()
    with opened(settings) as database:
        with database.reading() as connection:
            counts = {**delivery_log.settled(connection, before), REFUSED: refused.number(connection, before)}
        total = sum(counts.get(state, 0) for state in chosen)
        what = _and([f"{counts.get(state, 0)} {state}" for state in chosen])
        if total and not yes and not confirmed(f"Delete {what} deliveries? Their content cannot be had back."):
            return FAILED
        gone = 0
        sent, dead = (before if state in chosen else 0 for state in ("sent", "dead"))
        with progress("deleting", total) as advance:
            slices = Slices()  # a bridge that runs on this store goes on accepting
            while number := slices.run(partial(_purge_batch, database, sent, dead)):
                gone += number
                advance(number)
                time.sleep(slices.pause)
            if REFUSED in chosen:
                with database.engine.begin() as connection:
                    gone += refused.purge(connection, before)
    print(f"{gone} deliveries are deleted")
    return 0


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def purge_queued(
    settings: Settings,
    *,
    user: str = "",
    room: str = "",
    key: str = "",
    everything: bool = False,
    yes: bool = False,
    margin: float = MARGIN_SECONDS,
) -> int:
    """Delete queued events, so that they are not sent; returns the exit code: 1 when it is not confirmed, or some stay.

    Raises Usage.
    """
    if not (user or room or key) and not everything:
        raise Usage("--queued: say of which --user, --room or --key, or --all")
    if user and not user.startswith("@"):
        raise Usage(f"--user: {printable(as_text(user))[:80]!r} is not a user id, which begins with '@'")
    whose = Whose(as_text(user) or None, as_text(key) or None)
    selection = replace(located(settings, select(state=["queued"], room=room)), whose=whose)
    with opened(settings) as database:
        with database.reading() as connection:
            total, newest = delivery_log.extent(connection, selection)
            counts = delivery_log.queued_of(connection, selection)
        if total and not yes and not confirmed(_question(total, counts)):
            return FAILED
        patience = max(settings.lease_seconds, settings.request_seconds) + margin
        with progress("deleting", total) as advance:
            gone, left = _remove_queued(database, delivery_log.chosen(selection, newest), patience, advance)
    print(f"{gone} queued events are deleted")
    if left:
        say(f"{left} stay: a running bridge is sending them, or has not let go of their rooms")
    return FAILED if left else 0


def _question(total: int, counts: Sequence[tuple[str, int]]) -> str:
    of = ", ".join(f"{number} of {printable(who)}" for who, number in counts[:SHOWN])
    of += f", and of {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    return f"Delete {total} queued events ({of})? They will not be sent."


def _remove_queued(
    database: Database, chosen: Sequence[ColumnElement[bool]], patience: float, advance: Callable[[int], None]
) -> tuple[int, int]:
    """How many are deleted, and how many stay. A running bridge is asked for the lanes that it holds in memory."""
    gone, deadline = 0, time.monotonic() + patience
    while True:
        with database.reading() as connection:
            owners = abandoned.owners(connection, chosen)
        for lanes in _batches([lane for lane, owner in owners.items() if owner is None]):
            while number := _remove_batch(database, lanes, chosen):
                gone += number
                advance(number)
        if not owners or time.monotonic() > deadline:
            break
        if taken := [lane for lane, owner in owners.items() if owner is not None]:
            for lanes in _batches(taken):
                with database.engine.begin() as connection:
                    abandoned.ask_for(connection, lanes)
            time.sleep(ASK_SECONDS)
    with database.reading() as connection:
        return gone, abandoned.number(connection, chosen)


def _batches(lanes: Sequence[str]) -> Iterator[Sequence[str]]:
    return (lanes[start : start + LANES] for start in range(0, len(lanes), LANES))


def _remove_batch(database: Database, lanes: Sequence[str], chosen: Sequence[ColumnElement[bool]]) -> int:
    with database.engine.begin() as connection:
        return abandoned.remove(connection, lanes, chosen)


def _purge_batch(database: Database, sent: int, dead: int, limit: int) -> int:
    with database.engine.begin() as connection:
        return retention.purge(connection, sent, dead, limit)
