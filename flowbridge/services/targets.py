"""What a message refers to by an event id: is it in the room, and may it be edited? Only the homeserver knows.

It would take any event id: an edit of somebody else's message, or a reply to one of another room, is an event that no
client shows, and its sender would have heard 200.
"""

import asyncio
from collections.abc import Mapping

from flowbridge import log
from flowbridge.errors import BadContent, MatrixError, Problem
from flowbridge.events.message import RULE
from flowbridge.homeserver import Homeserver
from flowbridge.limits.cache import Cache
from flowbridge.models import Caller

SENDER_SECONDS = 86_400.0  # no event changes its sender
MAX_SENDERS = 10_000


class Targets:
    """For one event loop."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._senders = Cache[tuple[str, str, str], str](MAX_SENDERS, SENDER_SECONDS)  # as an account sees them

    async def check(self, caller: Caller, room_id: str, named: Mapping[str, str]) -> None:
        """`named`: event ids by the pointers to them. Raises BadContent.

        A homeserver that cannot tell, or not soon, stops nothing: the event is accepted, as it would be for a target
        that is queued.
        """
        senders = await asyncio.gather(*(self._sender(caller, room_id, event_id) for event_id in named.values()))
        problems = [
            Problem(pointer, problem, RULE)
            for (pointer, event_id), sender in zip(named.items(), senders, strict=True)
            if (problem := _problem(pointer, event_id, sender, caller))
        ]
        if problems:
            raise BadContent(problems)

    async def _sender(self, caller: Caller, room_id: str, event_id: str) -> str | None:
        """Who sent it; "" when that is not known now, None when there is no such event in the room."""
        name = (caller.user_id, room_id, event_id)
        if (known := self._senders.get(name)) is not None:
            return known
        try:
            sender = await self._homeserver.sender_of(caller.token, room_id, event_id)
        except MatrixError as error:
            log.info("target_not_checked", event=event_id, error=error.error)
            return ""
        return sender and self._senders.put(name, sender)


def _problem(pointer: str, event_id: str, sender: str | None, caller: Caller) -> str:
    if sender is None:
        return f"there is no event {event_id} in this room, or {caller.user_id} cannot see it"
    if pointer == "/edit" and sender and sender != caller.user_id:
        return f"{event_id} is a message of {sender}, and only its sender can edit it: answer it by reply_to or thread"
    return ""
