"""What holds for the content of every event, whether its type has a schema or not.

Homeservers read some keys in events of all types. Synapse 1.163 answers 500 to some values of them each time, to
`{"m.mentions": {"user_ids": [null]}}` for one: such an event would hold up everything behind it in its room. The values
were found by sending the examples of the catalogue, mutated, to a real Synapse (tests/integration/test_poison.py).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from flowbridge.errors import Problem

if TYPE_CHECKING:
    from flowbridge.events.catalogue import Entry

EVENT: Final[Mapping[str, Any]] = {"$ref": "components/event.json"}
KEYS: Final = ("m.mentions", "m.relates_to", "org.matrix.labels", "redacts")  # the properties of that schema
_KEYS: Final = frozenset(KEYS)

# Types that a client has no reason to send, and that therefore have no schema in the catalogue.
UNLISTED: Final[Mapping[str, Mapping[str, Any]]] = {
    "m.room.aliases": {"properties": {"aliases": {"type": "array", "items": {"type": "string"}}}},
    "m.room.create": {"properties": {"type": {"type": "string"}}},
}
KEPT: Final = ("m.room.redaction",)  # whose own schema holds even when a folder of the user's replaces it


class General:
    """The rules for all types: ours, whatever a folder of the user's own schemas replaces."""

    def __init__(self, event: "Entry", by_type: "Mapping[str, Entry]") -> None:
        self._event = event
        self._by_type = by_type

    def problems(self, event_type: str, content: Mapping[str, Any]) -> list[Problem]:
        """What is wrong with these keys, by pointer; empty for nearly all events, which hold none of them."""
        found: list[Problem] = []
        if not _KEYS.isdisjoint(content):
            found = self._event.problems({key: content[key] for key in KEYS if key in content})
        entry = self._by_type.get(event_type)
        return found if entry is None else [*found, *entry.problems(content)]
