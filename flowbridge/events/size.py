"""How large an event's content may be (specification, "Size limits": an event has at most 65,536 bytes in all).

A homeserver adds to the content what its whole event needs: ids, hashes, a signature, references to other events.
"""

from typing import Any

from flowbridge.errors import TooLarge
from flowbridge.events import canonical_json

MAX_EVENT_BYTES = 65_536
SMALL_BYTES = 60_000  # content that fits whatever its event's ids are: each has 255 bytes at most
# Room version 3 and later: a sigil and 43 characters. Synapse 1.163 refers to 10 earlier events at most. Versions 1 and
# 2 have longer references, and their rooms, with several ends, a limit that only the homeserver knows.
_REFERENCE = "$" + "x" * 43
_PREVIOUS = 10
_AUTHORISING = {
    "m.room.member": 6
}  # create, power levels, join rules, both memberships, the one of the user who lets in
_AUTHORISING_OTHERS = 3  # create, power levels, the sender's membership


def check(content: bytes, event_type: str, state_key: str | None, room_id: str, sender: str) -> None:
    """Raises TooLarge for content (canonical JSON) that its event has no room for.

    While the room or the sender is unknown, "" stands for it, and the limit is a few bytes too high.
    """
    limit = largest(event_type, state_key, room_id, sender)
    if len(content) > limit:
        raise TooLarge(
            f"the content is {len(content)} bytes of canonical JSON, and this event has room for {limit}: Matrix "
            f"allows {MAX_EVENT_BYTES} with its room, sender and signature. Send a long text as a file, or in parts"
        )


def largest(event_type: str, state_key: str | None, room_id: str, sender: str) -> int:
    """The bytes of canonical JSON that the content of such an event may have on a current Synapse."""
    authorising = _AUTHORISING.get(event_type, _AUTHORISING_OTHERS)
    event: dict[str, Any] = {
        "auth_events": [_REFERENCE] * authorising,
        "content": {},
        "depth": 10**9,
        "hashes": {"sha256": "x" * 43},
        "origin_server_ts": 10**12,
        "prev_events": [_REFERENCE] * _PREVIOUS,
        "room_id": room_id,
        "sender": sender,
        "signatures": {sender.partition(":")[2]: {"ed25519:a_Abcd": "x" * 86}},
        "type": event_type,
        "unsigned": {"age_ts": 10**12},
    }
    if state_key is not None:
        event |= {"state_key": state_key, "unsigned": {**event["unsigned"], "replaces_state": _REFERENCE}}
    return MAX_EVENT_BYTES - len(canonical_json.write(event)) + len("{}")
