"""The events of the seed documents, as the demo sends them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Example:
    """An event as a seed document prints it: `body` is all of it, `state_key` None for a message event."""

    name: str
    type: str
    content: Mapping[str, Any]
    state_key: str | None
    body: Mapping[str, Any]
    source: str

    @property
    def label(self) -> str:
        """The type, and what distinguishes events of one type: `m.room.message m.audio`."""
        detail = self.content.get("msgtype") or self.content.get("membership")
        return f"{self.type} {detail}" if detail else self.type


def load_examples(schemas_dir: Path) -> list[Example]:
    """The examples under `schemas_dir`/examples that a seed document prints, by file name. Raises FileNotFoundError."""
    found = []
    for path in sorted((schemas_dir / "examples").glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        source = body.pop("$comment", "")
        if "seed " in source:
            found.append(_example(path.stem, body, source))
    if not found:
        raise FileNotFoundError(f"{schemas_dir}/examples holds no example of a seed document")
    return found


def _example(name: str, body: dict[str, Any], source: str) -> Example:
    return Example(name, body["type"], body["content"], body.get("state_key"), body, source)


def _state_of_2014(event_id: str, event_type: str, content: dict[str, int]) -> Example:
    body = {
        "content": content,
        "event_id": event_id,
        "required_power_level": 10,
        "room_id": "!MkDbyRqnvTYnoxjLYx:localhost",
        "state_key": "",
        "ts": 1409665585188,
        "type": event_type,
        "user_id": "@example:localhost",
    }
    return _example(event_type, body, "seed 004_4d6fafe6184dec7b.txt")


# State events of the guide that m.room.power_levels replaced: their types are not in the catalogue.
LEGACY = (
    _state_of_2014("WpmTgsNWUZ", "m.room.add_state_level", {"level": 10}),
    _state_of_2014("qUMBJyKsTQ", "m.room.send_event_level", {"level": 0}),
    _state_of_2014("YAaDmKvoUW", "m.room.ops_levels", {"ban_level": 5, "kick_level": 5}),
)
