"""How an account stands to a room that refuses it, in words that say what to do next. Pure.

Synapse 1.163 has one answer for three mistakes: "User @bot:hs not in room !r:hs, and room previews are disabled", for a
room that the account is not in, for one that does not exist, and for one that is private. The summary of a room
(`/_matrix/client/v1/room_summary`, Matrix 1.15) tells them apart.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flowbridge.errors import Errcode, HomeserverError, MatrixError

MAX_REASON = 200  # characters of what a moderator gave as a reason

_POWER = re.compile(r"user_level \((-?[0-9]+)\) < (?:send|[a-z]+)_level \((-?[0-9]+)\)")  # Synapse's

Membership = Literal["join", "invite", "knock", "ban", "leave", ""]
_MEMBERSHIPS: tuple[Membership, ...] = ("join", "invite", "knock", "ban", "leave")

Access = Literal["public", "knock", "private", "none", ""]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the homeserver says of an account and a room; "" where it does not.

    `access`: who may join. "private": only those who are invited; "none": the homeserver knows no such room. `by`: the
    user who removed the account from the room, or the account itself; `reason`: what that user gave as a reason.
    """

    user_id: str
    room_id: str
    membership: Membership = ""
    access: Access = ""
    by: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """What is wrong, and the next step. "" for an account that is in the room."""
        user = self.user_id
        match self.membership:
            case "join":
                return ""
            case "invite":
                return f"{user} is invited to this room, and has not joined it yet: POST /join/{self.room_id}"
            case "knock":
                return f"{user} has knocked on this room, and nobody has let it in yet: a member has to invite {user}"
            case "ban":
                return f"{user} is banned from this room: a moderator has to unban it; after that, {self._way_in()}"
        if self.access == "none":
            return self._no_such_room()
        if self.by and self.by != user:
            why = f" ({self.reason})" if self.reason else ""
            return f"{user} was removed from this room by {self.by}{why}: {self._way_in()}"
        if self.by:
            return f"{user} has left this room: {self._way_in()}"
        further = "; the room is private, and so far it is not" if self.access == "private" else ""
        return f"{user} is not in this room: {self._way_in()}{further}"

    def _way_in(self) -> str:
        match self.access:
            case "public":
                return f"POST /join/{self.room_id}, since anybody may join it"
            case "knock":
                knock = f"POST /_matrix/client/v3/knock/{self.room_id}"
                return f"invite {self.user_id}, or knock ({knock}) and have a member let it in"
            case "private":
                return f"invite {self.user_id}, or POST /join/{self.room_id} once it is invited"
        return f"invite {self.user_id}, or POST /join/{self.room_id}"

    def _no_such_room(self) -> str:
        server, own = self.room_id.partition(":")[2], self.user_id.partition(":")[2]
        text = f"the homeserver of {self.user_id} knows no room {self.room_id}: check the id"
        if server and server != own:
            return f"{text}, or, for a room of {server}, POST /join/{self.room_id}?via={server}"
        return f"{text} (Element shows it in the room's settings, under Advanced), or use the room's alias"


def of_summary(user_id: str, room_id: str, found: Mapping[str, Any]) -> Standing:
    """The standing by the summary of a room, which the homeserver gave."""
    rule = found.get("join_rule")
    access: Access = "public" if rule == "public" else "knock" if rule in ("knock", "knock_restricted") else "private"
    return Standing(user_id, room_id, _membership(found), access if isinstance(rule, str) else "")


def of_refusal(user_id: str, room_id: str, error: MatrixError) -> Standing:
    """The standing by the error that came instead of a summary."""
    access: Access = ""
    if error.status == 400 or (error.errcode == Errcode.NOT_FOUND and "unknown" in error.error.lower()):
        access = "none"  # Synapse: "Missing via to query remote room", of a room that none of its users was ever in
    elif error.errcode in (Errcode.NOT_FOUND, Errcode.FORBIDDEN):
        access = "private"  # Synapse: 404 "Room not found or is not accessible", of a room that it knows
    return Standing(user_id, room_id, "", access)


def as_member(standing: Standing, found: Mapping[str, Any]) -> Standing:
    """The standing with what the account's m.room.member says: who removed it from the room, and why."""
    content = found.get("content", found)  # a homeserver that does not know `format=event` answers the content alone
    membership = _membership(content)
    if not membership:
        return standing
    by, reason = found.get("sender"), content.get("reason")
    return replace(
        standing,
        membership=membership,
        by=by if isinstance(by, str) and membership == "leave" else "",
        reason=" ".join(reason.split())[:MAX_REASON] if isinstance(reason, str) else "",
    )


def of_power(user_id: str, what: str, refusal: str) -> str:
    """What is wrong where the account's power level is too low for `what`, by the text of a 403 M_FORBIDDEN.

    "" where something else is wrong, or it is not known.
    """
    if found := _POWER.search(refusal):
        have, need = found.groups()
        return f"{user_id} has power level {have} in this room, and {what} needs {need}: a moderator has to raise it"
    if "have permission" in refusal:
        return f"the power level of {user_id} in this room is too low for {what}: a moderator has to raise it"
    return ""


def _membership(content: Any) -> Membership:
    found = content.get("membership") if isinstance(content, dict) else None
    for known in _MEMBERSHIPS:
        if found == known:
            return known
    return ""


def in_words(error: MatrixError, words: str) -> MatrixError:
    """The homeserver's error with our words before its own, and its own beside it; unchanged without words."""
    if not words:
        return error
    beside = {**error.extra.get("flowbridge", {}), "homeserver": error.error}
    extra = {**error.extra, "flowbridge": beside}
    return HomeserverError(f"{words} ({error.error})", errcode=error.errcode, status=error.status, **extra)


def as_it_came(found: dict[str, Any]) -> dict[str, Any]:
    """The body of an error as the homeserver worded it, for Matrix clients, with our words beside it."""
    beside = found.get("flowbridge", {})
    if "homeserver" not in beside:
        return found
    rest = {name: value for name, value in beside.items() if name != "homeserver"}
    return {**found, "error": beside["homeserver"], "flowbridge": {**rest, "hint": found["error"]}}
