"""/sync and /messages: how the homeserver is asked what happens in rooms, and what its answers hold."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from flowbridge.errors import BadGateway
from flowbridge.homeserver import large_json, paths

Json = dict[str, Any]

MAX_TEXT: Final = 255  # characters of a name or an alias in an invitation: strangers choose them

# For filters.
NOTHING: Final[Json] = {"types": []}
ROOMS_ALONE: Final[Json] = {"presence": NOTHING, "account_data": NOTHING}


class Read(Protocol):
    """GET JSON from the homeserver within `seconds`, of `limit` bytes at most: `Homeserver.read` and its like."""

    async def __call__(
        self, target: str, *, token: str, seconds: float | None = None, limit: int | None = None
    ) -> tuple[bytes, Any]: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """An answer to a sync, `size` bytes long. `next_batch`: the `since` of the next one."""

    value: Json
    next_batch: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation as a sync has it. `event`: the m.room.member event that invites, with few of its fields."""

    room_id: str
    inviter: str
    name: str
    canonical_alias: str
    event: Json

    def shown(self) -> Json:
        """As callers see it, without the fields that it does not have."""
        found = {"room_id": self.room_id, "inviter": self.inviter, "name": self.name}
        found["canonical_alias"] = self.canonical_alias
        return {name: text for name, text in found.items() if text}


@dataclass(frozen=True, slots=True)
class Page:
    """Events of a room, in the order in which they were asked for. `end`: where the next page begins, "" at the end."""

    events: list[Json]
    end: str
    size: int


class SyncClient:
    """Asks as the account whose token is given. Every method raises MatrixError."""

    def __init__(self, read: Read) -> None:
        self._read = read

    async def sync(
        self,
        token: str,
        filter_: Json,
        *,
        since: str = "",
        wait: float = 0.0,
        patience: float,
        online: bool = False,
        fresh: bool = True,
        limit: int | None = None,
    ) -> Batch:
        """What is new since then, or how things stand; waits for it so many seconds, and `patience` for the answer.

        Unless `online`, the account's presence stays as it is. `fresh`: not what was answered to the same question
        before. Synapse keeps its answer to a sync for two minutes (`sync_response_cache_duration`); a room that does
        not exist in the filter, another one each time, makes it a new question.
        """
        if fresh:
            filter_ = {
                **filter_,
                "room": {**filter_["room"], "not_rooms": [f"!{secrets.token_hex(8)}:nowhere.invalid"]},
            }
        query = {"filter": large_json.write(filter_).decode(), "timeout": str(int(wait * 1000))}
        if since:
            query["since"] = since
        if not online:
            query["set_presence"] = "offline"
        body, value = await self._read(paths.sync_target(query), token=token, seconds=wait + patience, limit=limit)
        next_batch = value.get("next_batch") if isinstance(value, dict) else None
        if not isinstance(next_batch, str) or not next_batch:
            raise BadGateway("the homeserver's answer to a sync names no next_batch")
        return Batch(value, next_batch, len(body))

    async def messages(
        self,
        token: str,
        room_id: str,
        *,
        since: str = "",
        until: str = "",
        backwards: bool = False,
        only: Mapping[str, Any] | None = None,
        limit: int = 100,
    ) -> Page:
        """Up to `limit` events of a room, from one place to another. `only`: a room event filter (specification)."""
        query = {"dir": "b" if backwards else "f", "limit": str(limit)}
        if since:
            query["from"] = since
        if until:
            query["to"] = until
        if only:
            query["filter"] = large_json.write(only).decode()
        target = paths.room_target(room_id, "messages", query)
        body, value = await self._read(target, token=token)
        if not isinstance(value, dict):
            raise BadGateway("the homeserver's answer to /messages is not a JSON object")
        end = value.get("end")
        return Page(objects(value, "chunk"), end if isinstance(end, str) else "", len(body))


def invitations(sync: Json, user_id: str) -> list[Invitation]:
    """The rooms of a sync that a user is invited to. Everything in them is what another server says."""
    found = []
    for room_id, data in section(sync, "rooms", "invite").items():
        state = listed(data, "invite_state")
        members = [each for each in state if each.get("type") == "m.room.member" and each.get("state_key") == user_id]
        event = members[-1] if members else {}
        name, alias = _of(state, "m.room.name", "name"), _of(state, "m.room.canonical_alias", "alias")
        found.append(Invitation(room_id, _text(event.get("sender")), name, alias, event))
    return found


def _of(state: list[Json], type_: str, key: str) -> str:
    """A text in the content of a state event; "" where there is none."""
    contents = (section(each, "content") for each in state if (each.get("type"), each.get("state_key")) == (type_, ""))
    return next((_text(content.get(key)) for content in contents), "")


def _text(value: Any) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def unmarked(event: Json) -> Json:
    """An event without what only the bridge says of it: a server may put any member into its events, `verified` too."""
    return {name: value for name, value in event.items() if name != "flowbridge"} if "flowbridge" in event else event


def section(value: Any, *names: str) -> Json:
    """The object under these names; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def objects(value: Any, name: str) -> list[Json]:
    """The objects in the list of this name; none where there is no such list."""
    found = value.get(name) if isinstance(value, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def listed(value: Any, name: str) -> list[Json]:
    """The `events` of a section of a sync."""
    return objects(section(value, name), "events")
