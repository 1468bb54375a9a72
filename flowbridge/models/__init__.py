"""The values that the packages hand to each other."""

from dataclasses import dataclass, field
from typing import Any, Literal

Surface = Literal["flow", "matrix"]
Kind = Literal["message", "state"]


@dataclass(frozen=True, slots=True)
class Payload:
    """What a body holds: the content, and the state key when the body names one.

    `ignored`: keys beside the content that look like a part of it, and are not.
    """

    content: Any
    state_key: str | None = None
    ignored: tuple[str, ...] = ()
    size: int = field(default=0, compare=False)  # of the body, in bytes


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it is sent to the homeserver. `state_key` is None for a message event.

    `content` is the canonical JSON (UTF-8) that was validated: what was checked is what is sent.
    """

    room: str
    type: str
    content: bytes
    state_key: str | None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A bridge API key and its scopes. Without `rooms`, or without `event_types`, it covers all of them.

    `admin` widens whose deliveries the key sees, never its rooms and event types. `users`: Matrix users whose own
    events it may replay.
    """

    id: str
    name: str = ""
    rooms: tuple[str, ...] = ()
    event_types: tuple[str, ...] = ()
    admin: bool = False
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """The account and the token of a request. `bot`: the bridge's own account, on behalf of `key` if there is one."""

    user_id: str
    device_id: str | None
    token: str
    bot: bool = False
    key: ApiKey | None = None
