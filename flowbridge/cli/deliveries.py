"""`flowbridge deliveries`: the delivery log on the database itself, with the server up or down."""

import asyncio
import contextlib
import getpass
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection
from sqlalchemy.sql import ColumnElement

from flowbridge.auth.tokens import cipher
from flowbridge.cli.store import opened
from flowbridge.errors import BadRequest, MatrixError
from flowbridge.homeserver import paths
from flowbridge.services.deliveries import detail, moment, new_txn_id, states, summary
from flowbridge.settings import Settings
from flowbridge.store import Database, abandoned, clock, delivery_log, retention
from flowbridge.store.delivery_log import Selection, Whose

T = TypeVar("T")

FAILED = 1
BATCH = 100  # replays in one commit: a server beside us waits for no longer than for one of its own
SHOWN = 5  # callers that a question names
LANES = 100  # that are asked for, or emptied, in one go
ASK_SECONDS = 0.2
MARGIN_SECONDS = 5.0
WIDE = 1_000  # columns of what is no terminal, so that nothing is cut off

_HEADS = (("DELIVERY", "ROOM"), ("STATUS", "TYPE"), ("ACCEPTED", "BY"), ("TRIES", "EVENT OR ERROR"))
_COLOURS = {"dead": "red", "queued": "yellow", "sent": "green"}
_AGE = re.compile(r"([0-9]{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


class Usage(Exception):
    """Options that cannot be used; one line."""


def choose(
    *, state: Sequence[str] = (), room: str = "", event_type: str = "", since: str = "", until: str = ""
) -> Selection:
    """The deliveries that options name. Raises Usage."""
    try:
        return Selection(
            states=states(",".join(state), "--state"),
            room_id=paths.identifier(room, "--room") if room else None,
            event_type=paths.identifier(event_type, "--type") if event_type else None,
            since=_ago(since, "--since") if since else None,
            until=_ago(until, "--until") if until else None,
        )
    except BadRequest as error:
        raise Usage(error.error) from None


def show_all(settings: Settings, selection: Selection, limit: int, *, as_json: bool) -> int:
    """Print deliveries, the newest first; returns the exit code."""
    with (
        opened(settings) as database,
        database.engine.connect().execution_options(reads=True) as connection,
    ):
        rows, _ = delivery_log.page(connection, selection, limit)
    found = [summary(row) for row in rows]
    if as_json:
        _print_json({"deliveries": found})
    elif found:
        is_terminal = sys.stdout.isatty()
        # Everything is taken as it is: room names and errors are other people's words.
        console = Console(markup=False, highlight=False, emoji=False, width=None if is_terminal else WIDE)
        console.print(_table(found, stacked=is_terminal))
    else:
        _say("no such deliveries")
    return 0


def show(settings: Settings, delivery: str, *, as_json: bool) -> int:
    """Print all about a delivery; returns the exit code: 1 when there is none of this name."""
    with (
        opened(settings) as database,
        database.engine.connect().execution_options(reads=True) as connection,
    ):
        row = delivery_log.get(connection, _sayable(delivery))
    if row is None:
        return _unknown(delivery)
    if as_json:
        _print_json(detail(row))
    else:
        _print_detail(detail(row))
    return 0


def replay(settings: Settings, deliveries: Sequence[str], *, overwrite: bool = False) -> int:
    """Queue settled deliveries again, in this order; returns the exit code: 1 when one of them cannot be.

    A state event that would overwrite what was set since is asked about, or refused where nobody can be asked.
    """
    failed = False
    with opened(settings) as database:
        for delivery in map(_sayable, deliveries):
            row = _read(database, partial(delivery_log.get, delivery=delivery))
            if row is None:
                failed = bool(_unknown(delivery))
            elif row["state"] == "queued":
                failed = True
                _say(f"{delivery} is queued already")
            elif not overwrite and (why := _overwrites(settings, [row]).get(delivery)) and not _accepted(why):
                failed = True
            elif _replay(database, delivery):
                print(f"{delivery} is queued")
            else:
                failed = True
                _say(f"{delivery} is queued already, or gone")
    return FAILED if failed else 0


def replay_dead(settings: Settings, selection: Selection, *, overwrite: bool = False) -> int:
    """Queue all dead letters of a selection again, the oldest first; returns the exit code.

    State events that would overwrite what was set since stay as they are, unless `overwrite`: then it is 1.
    """
    with opened(settings) as database:
        total, newest = _read(database, partial(delivery_log.extent, selection=selection))
        skipped = {} if overwrite else _overwritten_by(settings, database, selection, newest)
        queued, after = 0, 0
        with _progress("replaying", total) as advance:
            # Not beyond the newest of now: what dies once more meanwhile has a higher id.
            while batch := _replay_batch(database, selection, after, newest, skipped.keys()):
                queued += sum(1 for _, replayed in batch if replayed)
                after = batch[-1][0]
                advance(len(batch))
    for why in skipped.values():
        _say(_printable(why))
    print(f"{queued} of {total} dead letters are queued")
    return FAILED if skipped else 0


def purge(settings: Settings, wanted: Sequence[str], older_than: str, *, yes: bool) -> int:
    """Delete what is settled; returns the exit code: 1 when it is not confirmed. Raises Usage."""
    chosen = choose(state=wanted).states or ("sent", "dead")
    if "queued" in chosen:
        raise Usage("--state: only what is sent or dead can be purged so; --queued is for what is queued")
    before = _ago(older_than or "0s", "--older-than", ages_only=True)
    with opened(settings) as database:
        with database.engine.connect().execution_options(reads=True) as connection:
            counts = delivery_log.settled(connection, before)
        total = sum(counts.get(state, 0) for state in chosen)
        what = " and ".join(f"{counts.get(state, 0)} {state}" for state in chosen)
        if total and not yes and not _confirmed(f"Delete {what} deliveries? Their content cannot be had back."):
            return FAILED
        gone = 0
        sent, dead = (before if state in chosen else 0 for state in ("sent", "dead"))
        with _progress("deleting", total) as advance:
            while number := _purge_batch(database, sent, dead):
                gone += number
                advance(number)
    print(f"{gone} deliveries are deleted")
    return 0


def purge_queued(
    settings: Settings, *, user: str = "", room: str = "", key: str = "", everything: bool = False, yes: bool = False
) -> int:
    """Delete what is queued, so that it is not sent; returns the exit code: 1 when it is not confirmed, or some stay.

    Raises Usage.
    """
    if not (user or room or key) and not everything:
        raise Usage("--queued: say of which --user, --room or --key, or --all")
    if user and not user.startswith("@"):
        raise Usage(f"--user: {_printable(_sayable(user))[:80]!r} is not a user id, which begins with '@'")
    whose = Whose(_sayable(user) or None, _sayable(key) or None)
    selection = replace(choose(state=["queued"], room=room), whose=whose)
    with opened(settings) as database:
        with database.engine.connect().execution_options(reads=True) as connection:
            total, newest = delivery_log.extent(connection, selection)
            counts = delivery_log.queued_of(connection, selection)
        of = ", ".join(f"{number} of {_printable(who)}" for who, number in counts[:SHOWN])
        of += f", and of {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        if total and not yes and not _confirmed(f"Delete {total} queued events ({of})? They will not be sent."):
            return FAILED
        patience = max(settings.lease_seconds, settings.request_seconds) + MARGIN_SECONDS
        with _progress("deleting", total) as advance:
            gone, left = _remove_queued(database, delivery_log.chosen(selection, newest), patience, advance)
    print(f"{gone} queued events are deleted")
    if left:
        _say(f"{left} stay: a running bridge is sending them, or has not let go of their rooms")
    return FAILED if left else 0


def _remove_queued(
    database: Database, chosen: Sequence[ColumnElement[bool]], patience: float, advance: Callable[[int], None]
) -> tuple[int, int]:
    """How many are deleted, and how many stay. What a running bridge holds in memory is asked for first."""
    gone, deadline = 0, time.monotonic() + patience
    while True:
        with database.engine.connect().execution_options(reads=True) as connection:
            held = abandoned.owners(connection, chosen)
        free = [lane for lane, owner in held.items() if owner is None]
        for some in (free[start : start + LANES] for start in range(0, len(free), LANES)):
            while number := _remove_batch(database, some, chosen):
                gone += number
                advance(number)
        taken = [lane for lane, owner in held.items() if owner is not None]
        if not held or time.monotonic() > deadline:
            break
        for some in (taken[start : start + LANES] for start in range(0, len(taken), LANES)):
            with database.engine.begin() as connection:
                abandoned.ask_for(connection, some)
        if taken:
            time.sleep(ASK_SECONDS)
    with database.engine.connect().execution_options(reads=True) as connection:
        return gone, abandoned.number(connection, chosen)


def _remove_batch(database: Database, lanes: Sequence[str], chosen: Sequence[ColumnElement[bool]]) -> int:
    with database.engine.begin() as connection:
        return abandoned.remove(connection, lanes, chosen)


def _replay_batch(
    database: Database, selection: Selection, after: int, newest: int, but: Collection[str]
) -> list[tuple[int, bool]]:
    """The next dead letters: id, and whether it was queued; not, when somebody was faster, or it is one of `but`."""
    with database.engine.begin() as connection:
        found = delivery_log.deliveries(connection, selection, after, newest, BATCH)
        return [
            (id_, delivery not in but and delivery_log.replay(connection, delivery, new_txn_id(), _who()) is not None)
            for id_, delivery in found
        ]


def _replay(database: Database, delivery: str) -> bool:
    with database.engine.begin() as connection:
        return delivery_log.replay(connection, delivery, new_txn_id(), _who()) is not None


def _read(database: Database, work: Callable[[Connection], T]) -> T:
    with database.engine.connect().execution_options(reads=True) as connection:
        return work(connection)


def _overwritten_by(settings: Settings, database: Database, selection: Selection, newest: int) -> dict[str, str]:
    """The state events of a selection that would overwrite what was set since, each with a line that says so."""
    found: dict[str, str] = {}
    after = 0
    while batch := _read(
        database, partial(delivery_log.state_events, selection=selection, after=after, last=newest, limit=BATCH)
    ):
        found |= _overwrites(settings, batch)
        after = batch[-1]["id"]
    return found


def _overwrites(settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Those of these deliveries whose replay might overwrite what was set since, each with a line that says so."""
    states = [row for row in rows if row["state_key"] is not None]
    return asyncio.run(_look(settings, states)) if states else {}


async def _look(settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
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
                shown = f"\nthe room has {_json(current)}" if current else ""
                found[row["delivery"]] = f"{row['delivery']}: {said}{shown}"
    finally:
        await core.database.stop()
        core.homeserver.close()
    return found


def _accepted(why: str) -> bool:
    """Whether somebody at a terminal wants it all the same."""
    _say(_printable(why))
    return sys.stdin.isatty() and typer.confirm("Overwrite it?", err=True)


def _purge_batch(database: Database, sent: int, dead: int) -> int:
    with database.engine.begin() as connection:
        return retention.purge(connection, sent, dead)


def _ago(text: str, option: str, *, ages_only: bool = False) -> int:
    """A time, or how long ago it is (`90m`, `7d`), as ms since 1970. Raises Usage."""
    if found := _AGE.fullmatch(text):
        return clock.now_ms() - int(found[1]) * _SECONDS[found[2]] * 1000
    if ages_only:
        raise Usage(f"{option}: {text[:80]!r} is not an age: write it like 90m, 12h or 7d")
    try:
        return moment(text, option)
    except BadRequest as error:
        raise Usage(f"{error.error}, or like 2h or 7d") from None


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise Usage("nothing can be asked here: --yes deletes without asking")
    return typer.confirm(question, err=True)


def _who() -> str:
    with contextlib.suppress(Exception):  # a container's user may have no name
        return f"cli:{getpass.getuser()}"
    return "cli:"


def _sayable(delivery: str) -> str:
    """As it can be asked for: an argument may be no UTF-8."""
    return delivery.encode("utf-8", "replace").decode()


def _table(found: Sequence[dict[str, Any]], *, stacked: bool) -> Table:
    """`stacked`: two lines for each, since one would not fit into a terminal."""
    table = Table(box=None, pad_edge=False)
    least = max(len(one["delivery_id"]) for one in found)
    for heads in _HEADS:
        for head in ["\n".join(heads)] if stacked else heads:
            shrinks = stacked and head.startswith(("DELIVERY", "TRIES"))  # ids, times and types are read in full
            width = least if head.startswith("DELIVERY") else 5
            table.add_column(head, no_wrap=not shrinks, overflow="ellipsis", min_width=width)
    for one in found:
        pairs = _cells(one)
        table.add_row(*(Text("\n").join(pair) for pair in pairs) if stacked else chain.from_iterable(pairs))
    return table


def _cells(one: dict[str, Any]) -> tuple[tuple[Text, Text], ...]:
    outcome = one.get("event_id") or one.get("error", {}).get("error", "")
    return (
        (Text(one["delivery_id"]), _text(one["room_id"])),
        (Text(one["status"], style=_COLOURS[one["status"]]), _text(one["event_type"])),
        (Text(f"{one['accepted_at'][:19]}Z"), _text(one.get("api_key") or one.get("user_id", ""))),
        (Text(str(one["attempts"])), _text(outcome)),
    )


def _text(words: str) -> Text:
    return Text(_printable(words))


def _print_detail(found: dict[str, Any]) -> None:
    for key, value in found.items():
        if key not in ("event", "request", "history"):
            print(f"{key:<12} {_printable(value if isinstance(value, str) else json.dumps(value))}")
    print("", "event", _printable(_json(found["event"])), sep="\n")
    print("", "request", _printable(found["request"]), sep="\n")
    print("", "history", *(_printable(_entry(entry)) for entry in found["history"]), sep="\n")


def _entry(entry: dict[str, Any]) -> str:
    if was := entry.get("replayed"):
        return f"{entry['time']}  replayed by {was['by']}; it was {was['status']}, accepted {was['accepted_at']}"
    said = " ".join(str(entry[key]) for key in ("status", "errcode", "error") if key in entry)
    return f"{entry['time']}  {entry.get('milliseconds', 0)} ms  {said}"


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    """Shows on a terminal how far it is; yields what is told of each further number."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _print_json(value: Any) -> None:
    print(_printable(_json(value)))


def _printable(text: str) -> str:
    """Without what a terminal would obey, as JSON writes it."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1] for character in text
    )


def _unknown(delivery: str) -> int:
    _say(f"there is no delivery {_printable(_sayable(delivery))[:200]}")
    return FAILED


def _say(line: str) -> None:
    print(f"flowbridge: {line}", file=sys.stderr)
