"""Direct rooms: the room in which an account talks to one user (specification, "Direct Messaging").

Which room that is, the account's `m.direct` says, as all clients of the account do. A room that is made here is written
down there. What was found is kept in the store, so that accepting goes on while the homeserver is away.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from flowbridge import log
from flowbridge.auth.bot import later
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.names import Names
from flowbridge.errors import BadRequest, Forbidden, MatrixError, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once
from flowbridge.models import Caller
from flowbridge.store.accounts import account_of

M_DIRECT = "m.direct"
FOUND_SECONDS = 600.0
MAX_FOUND = 10_000
MAX_TRIED = 20  # rooms that `m.direct` names for one user, the newest first


class DirectRooms:
    """For one event loop. `encrypts_for`: whether what an account sends to encrypted rooms is encrypted."""

    def __init__(
        self,
        callers: Callers,
        homeserver: Homeserver,
        names: Names,
        encrypts_for: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._encrypts_for = encrypts_for
        self._callers = callers
        self._homeserver = homeserver
        self._names = names
        self._found = Cache[tuple[str, str], str](MAX_FOUND, FOUND_SECONDS)
        self._learning = Once[tuple[str, str, bool], str]()

    async def room(self, credential: Credential, user_id: str) -> str:
        """The id of the room; it is made where there is none.

        An API key with rooms of its own makes none. Raises Forbidden, what the homeserver says, or Unavailable.
        """
        caller = await self._callers.author(credential)
        if caller.user_id == user_id:
            raise BadRequest(f"{user_id} is this account itself: name another user, or a room")
        if (room_id := self._found.get((caller.user_id, user_id))) is not None:
            return room_id
        key = credential.key
        makes = key is None or not key.rooms
        try:
            learn = partial(self._learn, caller, user_id, makes=makes)
            room_id = await self._learning.get((caller.user_id, user_id, makes), learn)
        except MatrixError as error:
            error = self._callers.refused(caller, error)
            if error.status < 500 or (known := await self._names.find(_name(caller, user_id))) is None:
                raise later(error) from None
            return known
        self._names.note(_name(caller, user_id), room_id)
        return self._found.put((caller.user_id, user_id), room_id)

    async def _learn(self, caller: Caller, user_id: str, *, makes: bool) -> str:
        if not caller.token:
            raise Unavailable(f"the room with {user_id} is not known while the bridge's own account has no token")
        rooms = await self._homeserver.account_data(caller.token, caller.user_id, M_DIRECT)
        named = _rooms_with(rooms, user_id)
        made = await self._names.find(_name(caller, user_id))  # by us, and perhaps not written down
        for room_id in [*reversed(named[-MAX_TRIED:]), *([made] if made and made not in named else [])]:
            if await self._is_there(caller, room_id, user_id):
                break
        else:
            if not makes:
                raise Forbidden(
                    f"there is no room with {user_id} yet, and an API key that is for some rooms makes none: write to "
                    f"{user_id} once as {caller.user_id}, and make a key for that room"
                )
            encrypted = self._encrypts_for(account_of(caller.user_id))
            room_id = await self._homeserver.create_direct_room(caller.token, user_id, encrypted=encrypted)
            self._names.note(_name(caller, user_id), room_id)  # at once: were it not written down, it would be found
            log.info("direct_room_made", room=room_id, user=caller.user_id, other=user_id)
        if room_id not in named:
            written = {**rooms, user_id: [*named, room_id]}
            await self._homeserver.set_account_data(caller.token, caller.user_id, M_DIRECT, written)
        return room_id

    async def _is_there(self, caller: Caller, room_id: str, user_id: str) -> bool:
        """Whether both are in the room, or the other one is invited."""
        return await self._homeserver.membership(caller.token, room_id, user_id) in ("join", "invite")


def _rooms_with(rooms: dict[str, Any], user_id: str) -> list[str]:
    found = rooms.get(user_id)
    return [room for room in found if isinstance(room, str) and room.startswith("!")] if isinstance(found, list) else []


def _name(caller: Caller, user_id: str) -> str:
    return f"direct|{caller.user_id}|{user_id}"
