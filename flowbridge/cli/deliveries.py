"""`flowbridge deliveries list` and `show`: the delivery log in the database, whether the server runs or not."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection

from flowbridge.cli import FAILED
from flowbridge.cli.selection import located
from flowbridge.cli.store import opened
from flowbridge.cli.terminal import as_json, as_text, printable, say
from flowbridge.delivery.pending import Keeps
from flowbridge.delivery.waiting import Waiting, in_store
from flowbridge.services.deliveries import has_no_calls, place_of
from flowbridge.services.delivery_views import REFUSED, detail, lost, refused_summary, summary
from flowbridge.services.refused_calls import PREFIX
from flowbridge.settings import Settings
from flowbridge.store import delivery_log, refused
from flowbridge.store.delivery_log import ALL, Selection

WIDE = 1_000  # columns where the output is not a terminal, so that nothing is cut off

NAMED = 500  # deliveries in one question

_SAID = ("status", "errcode", "error", "note")
_HEADS = (("DELIVERY", "ROOM"), ("STATUS", "TYPE"), ("ACCEPTED", "BY"), ("TRIES", "EVENT OR ERROR"))
_COLOURS = {"dead": "red", "queued": "yellow", "sent": "green", REFUSED: "magenta"}


def show_all(settings: Settings, selection: Selection, limit: int, *, in_json: bool) -> int:
    """Print deliveries, the newest first; returns the exit code."""
    selection = located(settings, selection)
    with opened(settings) as database, database.reading() as connection:
        found = _listed(connection, selection, limit)
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


def _listed(connection: Connection, selection: Selection, limit: int) -> list[dict[str, Any]]:
    """Events, and calls that were refused, in one order."""
    calls = [] if has_no_calls(selection) else refused.page(connection, selection, limit)
    events: list[dict[str, Any]] = []
    if selection.states != (REFUSED,):
        states = tuple(state for state in selection.states if state != REFUSED)
        events, _ = delivery_log.page(connection, replace(selection, states=states), limit)
    rows = sorted([*events, *calls], key=place_of, reverse=True)[:limit]
    waiting = _waiting(connection, [row["delivery"] for row in rows if row.get("state") == "queued"])
    return [refused_summary(row) if "position" in row else summary(row, waiting.get(row["delivery"])) for row in rows]


def _waiting(connection: Connection, queued: Sequence[str]) -> dict[str, Waiting]:
    """What queued events wait for, as far as the store says it: the bridge that sends them knows more."""
    found: dict[str, Waiting] = {}
    for start in range(0, len(queued), NAMED):
        places = delivery_log.standings(connection, queued[start : start + NAMED])
        found |= {name: in_store(place) for name, place in places.items()}
    return found


def show(settings: Settings, delivery: str, *, in_json: bool) -> int:
    """Print a delivery in full; returns the exit code: 1 when there is no such delivery."""
    delivery = as_text(delivery)
    with opened(settings) as database, database.reading() as connection:
        found, why_lost = _found(connection, delivery, settings.keep_contents)
    if found is None:
        return unknown(delivery)
    if in_json:
        print(printable(as_json(found)))
    else:
        _print_detail(found, why_lost)
    return 0


def _found(connection: Connection, delivery: str, keeps: Keeps) -> tuple[dict[str, Any] | None, str]:
    """A delivery, and why its content is not shown, if it is not."""
    if delivery.startswith(PREFIX):
        call = refused.get(connection, delivery, ALL)
        return call and refused_summary(call), ""
    row = delivery_log.get(connection, delivery)
    if row is None:
        return None, ""
    return detail(row, _waiting(connection, [delivery]).get(delivery)), lost(row, keeps)


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
    outcome = one.get("event_id") or one.get("error", {}).get("error", "") or _reason(one.get("waiting"))
    at, number = one.get("accepted_at") or one["refused_at"], one.get("count") or one["attempts"]
    by = one.get("api_key") or one.get("hook") or one.get("user_id") or one.get("address", "")
    return (
        (Text(one["delivery_id"]), Text(printable(one["room_id"]))),
        (Text(one["status"], style=_COLOURS[one["status"]]), Text(printable(one["event_type"]))),
        (Text(f"{at[:19]}Z"), Text(printable(by))),
        (Text(str(number)), Text(printable(outcome))),
    )


def _reason(waiting: dict[str, Any] | None) -> str:
    if waiting is None:
        return ""
    return f"waits: {waiting['reason']}" + (f", until {waiting['until'][:19]}Z" if "until" in waiting else "")


def _print_detail(found: dict[str, Any], why_lost: str) -> None:
    for key, value in found.items():
        if key == "waiting":
            print(f"{key:<12} {printable(_reason(value).removeprefix('waits: '))}")
        elif key == "error":
            print(f"{key:<12} {printable(' '.join(str(value[name]) for name in _SAID if name in value))}")
        elif key not in ("event", "request", "history"):
            print(f"{key:<12} {printable(value if isinstance(value, str) else json.dumps(value))}")
    if "event" in found:
        print("", "event", printable(as_json(found["event"])), sep="\n")
        print("", "request", printable(found["request"]), sep="\n")
    elif found["status"] != REFUSED:
        print("", "event", why_lost, sep="\n")
    if "history" in found:
        print("", "history", *(printable(_entry(entry)) for entry in found["history"]), sep="\n")


def _entry(entry: dict[str, Any]) -> str:
    if was := entry.get("replayed"):
        return f"{entry['time']}  replayed by {was['by']}; it was {was['status']}, accepted {was['accepted_at']}"
    said = " ".join(str(entry[key]) for key in _SAID if key in entry)
    return f"{entry['time']}  {entry.get('milliseconds', 0)} ms  {said}"
