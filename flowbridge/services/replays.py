"""What a replay of a state event would overwrite: a room has one topic, and another user may have set it since."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flowbridge.auth.callers import Callers
from flowbridge.auth.tokens import Tokens
from flowbridge.errors import BadGateway, Errcode, GatewayTimeout, MatrixError, Unavailable, WrongState
from flowbridge.homeserver import Homeserver, answers
from flowbridge.models import Caller
from flowbridge.services.readings import Readings
from flowbridge.store import delivery_log
from flowbridge.store.json_columns import from_json

Row = Mapping[str, Any]  # of the outbox

_HINT = "add ?overwrite=true to send it all the same"


class Replays:
    """Compares a settled state event with what its room holds now."""

    def __init__(self, readings: Readings, homeserver: Homeserver, callers: Callers, tokens: Tokens) -> None:
        self._readings = readings
        self._homeserver = homeserver
        self._callers = callers
        self._tokens = tokens

    async def check(self, row: Row, caller: Caller | None = None) -> None:
        """Raises WrongState when sending this state event again would overwrite what was set since, or is queued.

        Its `flowbridge.current` is what the room holds. Raises WrongState, too, when the account may not see the
        state, and Unavailable while the homeserver cannot be asked. `caller`: whose token to ask with; otherwise the
        token of the account that sent the event, or the bot's. State set between this check and the replay is lost.
        """
        if newer := await self._readings.read_last(partial(delivery_log.queued_behind, row=row)):
            raise WrongState(
                f"a newer {row['event_type']} is queued for this room, as {newer}, and a replay would overwrite it; "
                f"{_HINT}"
            )
        try:
            current = await self._current(row, caller)
        except MatrixError as error:
            if isinstance(error, BadGateway | GatewayTimeout) or error.status >= 500 or error.status == 429:
                raise Unavailable(f"the room's state cannot be read now: {error.error}; or {_HINT}") from None
            raise WrongState(f"whether it would overwrite anything cannot be seen: {error.error}; {_HINT}") from None
        if current is not None and overwrites(row, current):
            raise WrongState(
                f"the room's {row['event_type']} has been set since by {current.get('sender', 'another user')}, "
                f"and a replay would overwrite it; {_HINT}",
                flowbridge={"current": _shown(current)},
            )

    async def _current(self, row: Row, caller: Caller | None) -> dict[str, Any] | None:
        """The state event that the room holds now, if any."""
        target = (row["room_id"], row["event_type"], row["state_key"], "format=event")
        answer = await self._homeserver.read_state(await self._token(row, caller), *target, any_status=True)
        if answer.status == 404 and answers.error(answer).errcode == Errcode.NOT_FOUND:
            return None
        found = answers.success(answer)
        # A homeserver that does not know `format` answers the content alone.
        return found if isinstance(found.get("content"), dict) and "event_id" in found else {"content": found}

    async def _token(self, row: Row, caller: Caller | None) -> str:
        if caller is not None:
            return caller.token
        if row["api_key"] is None and (known := await self._tokens.of(row["account"])) is not None:
            return known[2]
        bot = await self._callers.bot.caller()
        if bot is None:
            raise MatrixError("no token is known that could read the room", status=403)
        return bot.token


def overwrites(row: Row, current: Mapping[str, Any]) -> bool:
    """Whether the current state differs from a settled delivery's, and is newer than it.

    A dead letter was meant to replace what was there when it was accepted: only newer state would be lost unseen.
    """
    if current["content"] == from_json(row["content"]):
        return False
    if row["state"] == "sent":
        return True
    at = current.get("origin_server_ts")
    return not isinstance(at, int) or at > _first_accepted(row)


def _first_accepted(row: Row) -> int:
    """When an event was accepted for the first time (ms), before any replay that is remembered."""
    replayed = (entry["replayed"]["accepted_at"] for entry in from_json(row["history"]) if "replayed" in entry)
    return int(min([row["accepted_at"], *replayed]))


def _shown(current: Mapping[str, Any]) -> dict[str, Any]:
    return {name: current[name] for name in ("event_id", "sender", "origin_server_ts", "content") if name in current}
