"""`flowbridge send` and `flowbridge validate`: one event, by way of the same core as the server."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from flowbridge import log
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.cli import FAILED
from flowbridge.cli.terminal import as_json, note
from flowbridge.errors import BadContent, MatrixError
from flowbridge.homeserver import identifiers
from flowbridge.models import Event
from flowbridge.services.acceptance import How
from flowbridge.settings import Settings, SettingsError
from flowbridge.store.engine import place
from flowbridge.store.errors import StoreInUse

_ACCEPTED = """{status}: what is queued is sent, in its turn, by a flowbridge that runs on {database}.
`flowbridge deliveries show {delivery}` says how it ends. Do not send it again."""


def send(settings: Settings, room: str, event_type: str, body: bytes) -> int:
    """Send one event as the bot account; returns the exit code: 0 also when it is queued, since it will be sent."""
    if not settings.has_bot:
        raise SettingsError(
            "ACCESS_TOKEN: `send` acts as the bot account: set it, or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
        )
    return asyncio.run(_reported(_send(_core(settings), room, event_type, body)))


def validate(settings: Settings, event_type: str, body: bytes) -> int:
    """Check a payload; returns the exit code."""
    return asyncio.run(_reported(_validate(_core(settings), event_type, body)))


def _core(settings: Settings) -> Core:
    log.setup(settings.log_format, "warning")
    return Core(settings)


async def _reported(command: Coroutine[Any, Any, str]) -> int:
    try:
        if result := await command:
            print(result)
    except BadContent as error:
        for problem in error.problems:
            note(f"{problem.pointer or 'the whole content'}: {problem.message}  ({problem.schema})")
        return FAILED
    except MatrixError as error:
        note(f"{error.errcode}: {error.error}")
        return FAILED
    return 0


async def _send(core: Core, room: str, event_type: str, body: bytes) -> str:
    """By way of the store, as every send: an accepted event is not lost while the homeserver is away.

    Returns the event id; "" when the event is queued, which standard error reports.
    """
    event = await _checked(core, room, event_type, body)
    patience = core.settings.wait_seconds
    try:
        core.open(required=True)  # nobody would ever send what is queued in a new one
    except StoreInUse:  # a bridge runs, and delivers it: it polls for new events three times in a lease
        core = Core(core.settings, beside=True)
        patience += core.settings.lease_seconds / 3
    async with core.running():
        outcome = await core.sender.send(Credential(None), event, How("flow", request=body), patience)
    if outcome.error is not None:
        raise outcome.error
    if outcome.event_id is None:
        where = place(core.database.url)
        note(_ACCEPTED.format(status=outcome.status, delivery=outcome.delivery, database=where))
        return ""
    return outcome.event_id


async def _validate(core: Core, event_type: str, body: bytes) -> str:
    event = await _checked(core, "", event_type, body)
    return as_json(json.loads(event.content))


async def _checked(core: Core, room: str, event_type: str, body: bytes) -> Event:
    """The arguments are raw text, not path segments: nothing is percent-decoded."""
    if room:
        identifiers.room(room.replace("%", "%25"))
    identifiers.event_type(event_type.replace("%", "%25"))
    found = await core.acceptance.receive(body, "", event_type, "flow")
    if found.ignored:
        note(f"beside the payload, and ignored: {', '.join(found.ignored)}")
    return await core.acceptance.check(room, event_type, found, as_state=False)
