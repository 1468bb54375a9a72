"""The values that the rooms of the house hand to each other."""

from dataclasses import dataclass, field
from typing import Any, Literal

Surface = Literal["flow", "matrix"]
Kind = Literal["message", "state"]


@dataclass(frozen=True, slots=True)
class Payload:
    """What a body asked to send: the content, and the state key when the body named one."""

    content: Any
    state_key: str | None = None
    size: int = field(default=0, compare=False)  # bytes of the body that it was read from


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it goes to the homeserver. `state_key` is None for a message event.

    `content` is the canonical JSON (UTF-8) that was validated: what is checked is what is sent.
    """

    room: str
    type: str
    content: bytes
    state_key: str | None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a bridge API key may do. No rooms, or no event types, named: all of them.

    `admin` widens whose deliveries the key sees, never its rooms and event types. `users`: Matrix users whose own
    events it may send again.
    """

    id: str
    name: str = ""
    rooms: tuple[str, ...] = ()
    event_types: tuple[str, ...] = ()
    admin: bool = False
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is: the account and the token to act with. `bot`: the bridge acts, for `key` if a key asked."""

    user_id: str
    device_id: str | None
    token: str
    bot: bool = False
    key: ApiKey | None = None
