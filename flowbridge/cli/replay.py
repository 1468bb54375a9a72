"""`flowbridge deliveries replay`: queue settled events again, whether the server runs or not."""

import asyncio
import contextlib
import getpass
import sys
from collections.abc import Collection, Sequence
from typing import Any

import typer
from sqlalchemy import Connection

from flowbridge.auth.tokens import cipher
from flowbridge.cli import FAILED
from flowbridge.cli.deliveries import unknown
from flowbridge.cli.selection import located
from flowbridge.cli.store import opened
from flowbridge.cli.terminal import as_json, as_text, printable, progress, say
from flowbridge.errors import MatrixError
from flowbridge.services.deliveries import new_txn_id
from flowbridge.services.delivery_views import lost
from flowbridge.services.refused_calls import PREFIX
from flowbridge.settings import Settings
from flowbridge.store import Database, delivery_log
from flowbridge.store.delivery_log import Selection

BATCH = 100  # replays in one commit: a server beside us waits for no longer than for one of its own


def replay(settings: Settings, deliveries: Sequence[str], *, overwrite: bool = False) -> int:
    """Queue settled deliveries again, in this order; returns the exit code: 1 when one of them cannot be queued.

    A state event that would overwrite what was set since needs confirmation, and is refused without a terminal.
    """
    failed = False
    with opened(settings) as database:
        for delivery in map(as_text, deliveries):
            with database.reading() as connection:
                row = delivery_log.get(connection, delivery)
            if row is None and delivery.startswith(PREFIX):
                failed = True
                say(f"{printable(delivery)} is a call that was refused, of which nothing is kept: send it again")
            elif row is None:
                failed = bool(unknown(delivery))
            elif why := lost(row, settings.keep_contents):
                failed = True
                say(f"{delivery} cannot be sent again: {why}")
            elif row["state"] == "queued":
                failed = True
                say(f"{delivery} is queued already")
            elif not overwrite and (over := _overwrites(settings, [row]).get(delivery)) and not _accepted(over):
                failed = True
            else:
                with database.engine.begin() as connection:
                    replayed = _replay(connection, delivery)
                if replayed:
                    print(f"{delivery} is queued")
                else:
                    failed = True
                    say(f"{delivery} is queued already, or gone")
    return FAILED if failed else 0


def replay_dead(settings: Settings, selection: Selection, *, overwrite: bool = False) -> int:
    """Queue all dead letters of a selection again, the oldest first; returns the exit code.

    Without `overwrite`, state events that would overwrite what was set since are left as they are: then it is 1.
    """
    selection = located(settings, selection)
    with opened(settings) as database:
        with database.reading() as connection:
            total, newest = delivery_log.extent(connection, selection)
        skipped = {} if overwrite else _overwritten_by(settings, database, selection, newest)
        queued, after = 0, 0
        with progress("replaying", total) as advance:
            # Up to the newest of now: an event that becomes a dead letter again meanwhile has a higher id.
            while batch := _replay_batch(database, selection, after, newest, skipped.keys()):
                queued += sum(replayed for _, replayed in batch)
                after = batch[-1][0]
                advance(len(batch))
    for why in skipped.values():
        say(printable(why))
    print(f"{queued} of {total} dead letters are queued")
    return FAILED if skipped else 0


def _replay_batch(
    database: Database, selection: Selection, after: int, newest: int, exclude: Collection[str]
) -> list[tuple[int, bool]]:
    """The next dead letters: id, and whether it was queued; not in `exclude`, nor when a server was faster."""
    with database.engine.begin() as connection:
        found = delivery_log.deliveries(connection, selection, after, newest, BATCH)
        return [(id_, delivery not in exclude and _replay(connection, delivery)) for id_, delivery in found]


def _replay(connection: Connection, delivery: str) -> bool:
    return delivery_log.replay(connection, delivery, new_txn_id(), _by()) is not None


def _by() -> str:
    with contextlib.suppress(Exception):  # a container's user may have no name
        return f"cli:{getpass.getuser()}"
    return "cli:"


def _overwritten_by(settings: Settings, database: Database, selection: Selection, newest: int) -> dict[str, str]:
    """The state events of a selection that would overwrite what was set since, each with a line that says so."""
    found: dict[str, str] = {}
    after = 0
    while True:
        with database.reading() as connection:
            batch = delivery_log.state_events(connection, selection, after, newest, BATCH)
        if not batch:
            return found
        found |= _overwrites(settings, batch)
        after = batch[-1]["id"]


def _overwrites(settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Those of these deliveries whose replay might overwrite what was set since, each with a line that says so."""
    states = [row for row in rows if row["state_key"] is not None]
    return asyncio.run(_ask_rooms(settings, states)) if states else {}


async def _ask_rooms(settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    from flowbridge.bridge import Core

    core = Core(settings)
    core.database.open(shared=True)
    core.tokens.unlock(cipher(settings))
    core.database.start()
    found = {}
    try:
        for row in rows:
            try:
                await core.replays.check(row)
            except MatrixError as error:
                said = error.error.replace("add ?overwrite=true", "add --overwrite")
                current = error.extra.get("flowbridge", {}).get("current")
                shown = f"\nthe room has {as_json(current)}" if current else ""
                found[row["delivery"]] = f"{row['delivery']}: {said}{shown}"
    finally:
        await core.database.stop()
        core.homeserver.close()
    return found


def _accepted(why: str) -> bool:
    """Ask on a terminal whether to overwrite the state."""
    say(printable(why))
    return sys.stdin.isatty() and typer.confirm("Overwrite it?", err=True)
