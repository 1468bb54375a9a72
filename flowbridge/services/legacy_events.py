"""The answers of the first client-server API, made of homeservers' current answers. Pure.

Their form is that of the guide "How to use the client-server API" (initialSync, events), and of Synapse's own old
endpoints where the guide leaves it open. Every event keeps its current fields; `user_id`, `ts`, `age` and, for members,
`membership` are added.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flowbridge.homeserver.sync import Json, Page, listed, section

_FROM_UNSIGNED = ("age", "prev_content", "replaces_state", "redacted_because")


def event(found: Mapping[str, Any], room_id: str = "") -> Json:
    """One event with the old fields, too. `room_id`: for the events of a sync, which do not name it."""
    old = {**found, "room_id": room_id} if room_id else dict(found)
    if "sender" in found:
        old["user_id"] = found["sender"]
    if "origin_server_ts" in found:
        old["ts"] = found["origin_server_ts"]
    unsigned = section(found, "unsigned")
    old |= {key: unsigned[key] for key in _FROM_UNSIGNED if key in unsigned and key not in found}
    content = section(found, "content")
    if found.get("type") == "m.room.member" and "membership" in content:
        old["membership"] = content["membership"]
    return old


def page(found: Any) -> Any:
    """A list of state events, or a page of members or messages, with the old fields.

    Current homeservers leave `end` out of an empty page of messages. Clients of that time read it all the same: it is
    where the page began.
    """
    if isinstance(found, list):
        return _shaped(found)
    lists: Json = {
        key: _shaped(value) for key, value in found.items() if key in ("chunk", "state") and isinstance(value, list)
    }
    if not found.get("chunk") and "start" in found and "end" not in found:
        lists["end"] = found["start"]
    return {**found, **lists}


def snapshot(sync: Mapping[str, Any], user_id: str, visibilities: Mapping[str, str]) -> Json:
    """`initialSync`, from a sync without a `since`. `visibilities`: "public" or "private" by room id."""
    rooms = [room(sync, user_id, kind, room_id) for kind, room_id in rooms_of(sync)]
    for found in rooms:
        found["visibility"] = visibilities.get(found["room_id"], "private")
    return {
        "end": sync["next_batch"],
        "presence": [presence(found) for found in listed(sync, "presence")],
        "rooms": rooms,
        "receipts": [found for room_id in section(sync, "rooms", "join") for found in _receipts(sync, room_id)],
        "account_data": listed(sync, "account_data"),
    }


def room_snapshot(sync: Json, kind: str, room_id: str, state: Any, newest: Page, visibility: str) -> Json:
    """`rooms/{roomId}/initialSync`, from the room's state, its newest events, and what a sync says beside them.

    `kind`: join, leave, or "" for a room that the caller is not in but may read. Presence is that of its members.
    """
    found = _shaped(state) if isinstance(state, list) else []
    joined = {member.get("state_key") for member in found if member.get("membership") == "join"}
    return {
        "room_id": room_id,
        **({"membership": kind} if kind else {}),
        "visibility": visibility,
        "messages": {
            "chunk": _shaped(newest.events[::-1]),
            "start": newest.end or sync["next_batch"],
            "end": sync["next_batch"],
        },
        "state": found,
        "presence": [presence(status) for status in listed(sync, "presence") if status.get("sender") in joined],
        "receipts": _receipts(sync, room_id),
        "account_data": listed(section(sync, "rooms", kind, room_id), "account_data"),
    }


def room(sync: Mapping[str, Any], user_id: str, kind: str, room_id: str) -> Json:
    """One room of a sync. `kind`: join, invite or leave."""
    data = section(sync, "rooms", kind, room_id)
    if kind == "invite":
        invite = _invite(data, user_id, room_id)
        return {"room_id": room_id, "membership": "invite", "inviter": invite.get("sender", ""), "invite": invite}
    timeline = listed(data, "timeline")
    end = sync["next_batch"]
    return {
        "room_id": room_id,
        "membership": kind,
        "messages": {
            "chunk": [event(found, room_id) for found in timeline],
            "start": section(data, "timeline").get("prev_batch") or end,
            "end": end,
        },
        "state": [event(found, room_id) for found in _current(listed(data, "state"), timeline)],
        "account_data": listed(data, "account_data"),
    }


def chunk(sync: Mapping[str, Any], user_id: str, whole: Mapping[str, list[Json]]) -> list[Json]:
    """The events of a sync in one list: each room's in their order, rooms merged by time, then all other events.

    `whole`: by room id, all events since the previous sync of the rooms whose timeline was cut short.
    """
    timed: list[tuple[float, Json]] = []
    others: list[Json] = []
    for kind, room_id in rooms_of(sync):
        data = section(sync, "rooms", kind, room_id)
        timeline = whole.get(room_id, listed(data, "timeline"))
        latest = 0.0
        for each in [_invite(data, user_id, room_id)] if kind == "invite" else timeline:
            time = each.get("origin_server_ts")
            latest = max(latest, time if isinstance(time, int) else 0)
            timed.append((latest, event(each, room_id)))
        beside = listed(data, "ephemeral") + listed(data, "account_data")
        others += [{**each, "room_id": room_id} for each in beside]
    timed.sort(key=lambda pair: pair[0])  # stable, and within a room `latest` never falls
    others += [presence(found) for found in listed(sync, "presence")]
    return [found for _, found in timed] + others + listed(sync, "account_data")


def named_rooms(sync: Mapping[str, Any]) -> list[Json]:
    """`room_id` of each joined room, with `name`, `canonical_alias` and `encrypted` if so; sorted by name, then id."""
    found = []
    for room_id, data in section(sync, "rooms", "join").items():
        current = _current(listed(data, "state"), listed(data, "timeline"))
        state = {each.get("type"): section(each, "content") for each in current if each.get("state_key") == ""}
        room = {
            "room_id": room_id,
            "name": section(state, "m.room.name").get("name"),
            "canonical_alias": section(state, "m.room.canonical_alias").get("alias"),
        }
        named: Json = {key: text for key, text in room.items() if isinstance(text, str) and text}
        found.append({**named, "encrypted": True} if "m.room.encryption" in state else named)
    return sorted(found, key=lambda room: (room.get("name", "~").casefold(), room["room_id"]))


def presence(found: Mapping[str, Any]) -> Json:
    """An event of the presence stream, whose content once named the user."""
    return {**found, "content": {**section(found, "content"), "user_id": found.get("sender")}}


def rooms_of(sync: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind (join, invite, leave) and id of each room of a sync."""
    return [(kind, room_id) for kind in ("join", "invite", "leave") for room_id in section(sync, "rooms", kind)]


def _current(state: Iterable[Json], timeline: Iterable[Json]) -> Iterable[Json]:
    """A room's current state: a sync has the state before its timeline, and the events that changed it since."""
    now = {(found.get("type"), found.get("state_key")): found for found in state}
    now |= {(found.get("type"), found["state_key"]): found for found in timeline if "state_key" in found}
    return now.values()


def _invite(data: Json, user_id: str, room_id: str) -> Json:
    """The event that invites the caller, with the stripped state of the room beside it."""
    stripped = listed(data, "invite_state")
    mine = next((e for e in stripped if e.get("type") == "m.room.member" and e.get("state_key") == user_id), {})
    return {**event(mine, room_id), "invite_room_state": [found for found in stripped if found is not mine]}


def _receipts(sync: Mapping[str, Any], room_id: str) -> list[Json]:
    found = listed(section(sync, "rooms", "join", room_id), "ephemeral")
    return [{**each, "room_id": room_id} for each in found if each.get("type") == "m.receipt"]


def _shaped(found: Iterable[Any]) -> list[Any]:
    return [event(each) if isinstance(each, dict) else each for each in found]
