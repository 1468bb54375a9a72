"""Rooms: create them, and change who is in them.

An API key acts as the bot, in the rooms of its scopes: membership is the event type `m.room.member`. A key that names a
room may join it without that.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal

from flowbridge.auth import scopes
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.events import canonical_json
from flowbridge.homeserver import Homeserver, answers, paths
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Caller

Json = dict[str, Any]
Action = Literal["join", "invite", "leave", "kick", "ban", "unban"]

Joined = Callable[[str, str], Awaitable[None]]

PATIENCE_SECONDS = 120.0  # a room of another server may take a minute to join
MAX_AT_ONCE = 64  # of what may take so long: sends need the connections to the homeserver, too
MAX_OF_ONE = 16  # of one caller


class Rooms:
    """Every method answers as the homeserver does, and raises MatrixError with what it says.

    `joined`: called with each user who has joined a room, and the room's id: events may wait for that.
    """

    def __init__(
        self, homeserver: Homeserver, callers: Callers, room_access: RoomAccess, *, joined: Joined | None = None
    ) -> None:
        self._homeserver = homeserver
        self._callers = callers
        self._room_access = room_access
        self._turns = Limiter("rooms that are being made, joined or left", MAX_AT_ONCE, MAX_OF_ONE)
        self._joined = joined

    async def create(self, credential: Credential, body: Json, query: str = "") -> tuple[Caller, Json]:
        """Create a room. The answer has its room_id and, for a `room_alias_name`, room_alias as the guide prints it.

        `query`: further parameters for the homeserver.
        """
        scopes.permit_all(credential.key)
        caller = await self._callers.identify(credential)
        found = await self._post(caller, f"{paths.CLIENT}/createRoom{query}", body)
        if "room_alias_name" in body:
            server = caller.user_id.partition(":")[2]
            found.setdefault("room_alias", f"#{body['room_alias_name']}:{server}")
        return caller, found

    async def change(
        self, credential: Credential, room: str, action: Action, body: Json, query: str = ""
    ) -> tuple[Caller, Json]:
        """Change a user's membership; with join and leave the caller's own.

        `query`: further parameters for the homeserver: the servers to join by, or the user that a service acts as.
        """
        if action == "join" and credential.key is None:
            caller, room_id = await self._callers.identify(credential), room
        else:
            permit = partial(scopes.permit, credential.key, scopes.MEMBER)
            if action == "join":
                permit = partial(scopes.permit_joining, credential.key)
            caller, room_id = await self._room_access.enter(credential, room, permit)
        if action == "join" and (query or room.startswith("#")):
            target = paths.join_target(room)
        else:
            target = paths.member_target(room_id, action)
        target += query
        found = await self._post(caller, target, body)
        if action == "join" and self._joined is not None and isinstance(joined := found.get("room_id", room_id), str):
            await self._joined(caller.user_id, joined)
        return caller, found

    async def _post(self, caller: Caller, target: str, body: Json) -> Json:
        async with self._turns.turn(peer.who(), self._homeserver.deadline):
            with self._callers.as_(caller):
                request = canonical_json.write(body)
                answer = await self._homeserver.call(
                    "POST", target, token=caller.token, body=request, deadline=PATIENCE_SECONDS
                )
                return answers.success(answer)
