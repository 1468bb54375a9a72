"""Late binding: an event whose target had no event id when it was accepted gets its relations when its turn comes.

Its target is in the same lane, and before it, so it has been sent by then, or is dead. The content with its relations
is in the store before it is sent: what is tried again, or looked for, is the same event.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection

from flowbridge.events import canonical_json
from flowbridge.events.relations import Binding, Found, Target, bind
from flowbridge.store import Fence, Row, clock, leases, message_keys, outbox
from flowbridge.store.json_columns import from_json, to_json

Amended = Callable[[dict[str, Any]], dict[str, Any]]  # a row of the outbox, with an outcome that is not written yet


@dataclass(frozen=True, slots=True)
class Resolved:
    """What became of a binding. `missing`: why the event is pointless, and its row as it was."""

    content: bytes
    history: list[dict[str, Any]]
    missing: str = ""


def resolve(connection: Connection, row: Row, fence: Fence, amended: Amended) -> Resolved | None:
    """Write the content with its relations, and what a key stands for now; None: the lane has another holder."""
    if not leases.is_held(connection, fence):
        return None
    binding = Binding.from_json(row.binding or "{}")
    owner, now = row.api_key or row.account, clock.now_ms()

    @cache
    def find(target: Target) -> Found | str:
        if target.kind == "event":
            return Found(target.name)
        if target.kind == "delivery":
            return _sent(connection, target.name, None, amended) or f"{target} was not sent"
        known = message_keys.find(connection, owner, row.room_id, target.name)
        if known is None:
            return f"{target} is not known"
        return _sent(connection, known["delivery"], known["event_id"], amended) or f"{target} was not sent"

    bound = bind(json.loads(row.content), binding, find)
    history = [*from_json(row.history), *({"at": now, "note": note} for note in bound.notes)]
    if bound.missing:
        return Resolved(row.content, history, bound.missing)
    if binding.key:
        if binding.on_update == "new" or isinstance(find(Target("key", binding.key)), str):
            message_keys.assign(connection, owner, row.room_id, binding.key, row.delivery, now)
        else:
            message_keys.touch(connection, owner, row.room_id, binding.key, now)
    content = canonical_json.write(bound.content)
    outbox.bind(connection, row.delivery, content, to_json(history))
    return Resolved(content, history)


def _sent(connection: Connection, delivery: str, kept: str | None, amended: Amended) -> Found | None:
    """The event that a delivery became. `kept`: its id, where its row may be deleted."""
    row = outbox.by_delivery(connection, [delivery]).get(delivery)
    if row is not None:
        row = amended(row)
        if row["state"] == "sent" and row["event_id"]:
            return Found(row["event_id"], _content(row["content"]))
    kept = kept or message_keys.of_delivery(connection, delivery)
    return Found(kept) if kept else None


def _content(text: str) -> Any:
    """What an event said; its content may be blanked."""
    return json.loads(text) if text else None
