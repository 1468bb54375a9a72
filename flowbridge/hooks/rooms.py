"""Whether the bot is where a hook wants to send: said when the hook is made, since a mistake shows only later."""

import asyncio

from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver

PATIENCE_SECONDS = 5.0  # for the homeserver: without its answer the hook is made all the same


class HookRooms:
    def __init__(self, callers: Callers, room_access: RoomAccess, homeserver: Homeserver) -> None:
        self._callers = callers
        self._room_access = room_access
        self._homeserver = homeserver

    async def standing(self, room: str) -> str:
        """What keeps the bot from sending to a room, or to a user, as a sentence with the next step; "": nothing."""
        if not self._callers.bot.is_configured:
            return (
                "the bridge has no account to send with: set ACCESS_TOKEN, or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
            )
        if room.startswith("@"):  # the direct room is made
            return ""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                bot = await self._callers.identify(Credential(None))
                room_id = await self._room_access.room_id(bot, room) if room.startswith("#") else room
                membership = await self._homeserver.membership(bot.token, room_id, bot.user_id)
        except (MatrixError, TimeoutError) as error:
            why = error.error if isinstance(error, MatrixError) else "the homeserver does not answer"
            return f"whether the bot is in {room} is not known: {why}"
        if membership == "join":
            return ""
        return f"{bot.user_id} is not in {room}: invite it, or POST /join/{room}; until then messages wait"
