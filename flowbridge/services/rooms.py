"""Rooms: create them, change who is in them, and say why that was refused.

An API key acts as the bot, in the rooms of its scopes: membership is the event type `m.room.member`. A key that names a
room may join it without that.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal

from flowbridge.auth import scopes
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.errors import Errcode, MatrixError
from flowbridge.events import canonical_json
from flowbridge.homeserver import Homeserver, answers, paths, standing
from flowbridge.homeserver.standing import Standing
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Caller

Json = dict[str, Any]
Action = Literal["join", "invite", "leave", "kick", "ban", "unban"]

Joined = Callable[[str, str], Awaitable[None]]

PATIENCE_SECONDS = 120.0  # a room of another server may take a minute to join
MAX_AT_ONCE = 64  # of what may take so long: sends need the connections to the homeserver, too
MAX_OF_ONE = 16  # of one caller
MAX_EXPLAINED = 16  # refusals at once that the homeserver is asked about; the others are answered as they came
MAX_EXPLAINED_OF_ONE = 4


_AS_WORDS = {"invite": "inviting", "kick": "removing a user", "ban": "banning a user", "unban": "unbanning a user"}


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
        self._explanations = Limiter("refusals that are being explained", MAX_EXPLAINED, MAX_EXPLAINED_OF_ONE)
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

    async def standing(self, caller: Caller, room_id: str) -> Standing:
        """How an account stands to a room, as far as it may know."""
        with self._callers.as_(caller):
            if await self._homeserver.is_joined(caller.token, room_id, caller.user_id):
                return Standing(caller.user_id, room_id, "join")
            return await self._homeserver.standing(caller.token, room_id, caller.user_id)

    async def explained(self, credential: Credential, room: str, action: str, error: MatrixError) -> MatrixError:
        """What the homeserver refused in a room, in words that say which mistake it was, before its own.

        `action`: what was to be done, as the path names it. The error is returned as it is where nothing is known.
        """
        try:
            with self._explanations.hold(peer.who()):
                return await self._explained(credential, room, action, error)
        except MatrixError:
            return error

    async def _explained(self, credential: Credential, room: str, action: str, error: MatrixError) -> MatrixError:
        caller = await self._callers.identify(credential)
        try:
            room_id = await self._homeserver.resolve(caller.token, room) if room.startswith("#") else room
        except MatrixError as trouble:
            is_unknown = trouble.status == 404 and trouble.errcode == Errcode.NOT_FOUND
            words = f"no room has the alias {room}: check its spelling, or use the room's id"
            return standing.in_words(error, words if is_unknown else "")
        if error.status == 404 and action != "join":  # something in the room is not there
            return error
        found = await self.standing(caller, room_id)
        words = str(found)
        if found.membership == "join" and error.errcode == Errcode.FORBIDDEN:
            words = standing.of_power(caller.user_id, _AS_WORDS.get(action, "this"), error.error)
        return standing.in_words(error, words)

    async def _post(self, caller: Caller, target: str, body: Json) -> Json:
        async with self._turns.turn(peer.who(), self._homeserver.deadline):
            with self._callers.as_(caller):
                request = canonical_json.write(body)
                answer = await self._homeserver.call(
                    "POST", target, token=caller.token, body=request, deadline=PATIENCE_SECONDS
                )
                return answers.success(answer)
