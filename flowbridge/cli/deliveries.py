"""`flowbridge deliveries list` and `show`: the delivery log in the database, whether the server runs or not."""

import json
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowbridge.cli import FAILED
from flowbridge.cli.store import opened
from flowbridge.cli.terminal import as_json, as_text, printable, say
from flowbridge.services.delivery_views import detail, summary
from flowbridge.settings import Settings
from flowbridge.store import delivery_log
from flowbridge.store.delivery_log import Selection

WIDE = 1_000  # columns where the output is not a terminal, so that nothing is cut off

_HEADS = (("DELIVERY", "ROOM"), ("STATUS", "TYPE"), ("ACCEPTED", "BY"), ("TRIES", "EVENT OR ERROR"))
_COLOURS = {"dead": "red", "queued": "yellow", "sent": "green"}


def show_all(settings: Settings, selection: Selection, limit: int, *, in_json: bool) -> int:
    """Print deliveries, the newest first; returns the exit code."""
    with opened(settings) as database, database.reading() as connection:
        rows, _ = delivery_log.page(connection, selection, limit)
    found = [summary(row) for row in rows]
    if in_json:
        print(printable(as_json({"deliveries": found})))
    elif found:
        is_terminal = sys.stdout.isatty()
        # Nothing is interpreted: room names and errors are other people's words.
        console = Console(markup=False, highlight=False, emoji=False, width=None if is_terminal else WIDE)
        console.print(_table(found, stacked=is_terminal))
    else:
        say("no such deliveries")
    return 0


def show(settings: Settings, delivery: str, *, in_json: bool) -> int:
    """Print a delivery in full; returns the exit code: 1 when there is no such delivery."""
    with opened(settings) as database, database.reading() as connection:
        row = delivery_log.get(connection, as_text(delivery))
    if row is None:
        return unknown(delivery)
    if in_json:
        print(printable(as_json(detail(row))))
    else:
        _print_detail(detail(row))
    return 0


def unknown(delivery: str) -> int:
    """Report that there is no such delivery; returns the exit code."""
    say(f"there is no delivery {printable(as_text(delivery))[:200]}")
    return FAILED


def _table(found: Sequence[dict[str, Any]], *, stacked: bool) -> Table:
    """`stacked`: two lines for each delivery, since one would not fit into a terminal."""
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
        (Text(one["delivery_id"]), Text(printable(one["room_id"]))),
        (Text(one["status"], style=_COLOURS[one["status"]]), Text(printable(one["event_type"]))),
        (Text(f"{one['accepted_at'][:19]}Z"), Text(printable(one.get("api_key") or one.get("user_id", "")))),
        (Text(str(one["attempts"])), Text(printable(outcome))),
    )


def _print_detail(found: dict[str, Any]) -> None:
    for key, value in found.items():
        if key not in ("event", "request", "history"):
            print(f"{key:<12} {printable(value if isinstance(value, str) else json.dumps(value))}")
    print("", "event", printable(as_json(found["event"])), sep="\n")
    print("", "request", printable(found["request"]), sep="\n")
    print("", "history", *(printable(_entry(entry)) for entry in found["history"]), sep="\n")


def _entry(entry: dict[str, Any]) -> str:
    if was := entry.get("replayed"):
        return f"{entry['time']}  replayed by {was['by']}; it was {was['status']}, accepted {was['accepted_at']}"
    said = " ".join(str(entry[key]) for key in ("status", "errcode", "error", "note") if key in entry)
    return f"{entry['time']}  {entry.get('milliseconds', 0)} ms  {said}"
