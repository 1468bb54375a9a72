"""The commands that use the core once: `send` and `validate`."""

import asyncio
import json
import sys
from collections.abc import Coroutine
from typing import Any

from flowbridge import log
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.errors import BadContent, MatrixError
from flowbridge.homeserver import identifiers
from flowbridge.models import Event
from flowbridge.services.acceptance import How
from flowbridge.settings import Settings, SettingsError
from flowbridge.store.errors import StoreInUse

FAILED = 1

_ACCEPTED = """{status}: what is queued is sent, in its turn, by a flowbridge that runs on this store.
`flowbridge deliveries show {delivery}` says how it ends. Do not send it again."""


def send(settings: Settings, room: str, event_type: str, body: bytes) -> int:
    """Send one event as the bot account; returns the exit code: 0 also when it is queued, for it will be sent."""
    if not settings.has_bot:
        raise SettingsError(
            "ACCESS_TOKEN: `send` acts as the bot account: set it, or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
        )
    return asyncio.run(_told(_send(_core(settings), room, event_type, body)))


def validate(settings: Settings, event_type: str, body: bytes) -> int:
    """Check a payload; returns the exit code."""
    return asyncio.run(_told(_validate(_core(settings), event_type, body)))


def _core(settings: Settings) -> Core:
    log.setup(settings.log_format, "warning")
    return Core(settings)


async def _told(command: Coroutine[Any, Any, str]) -> int:
    try:
        if said := await command:
            print(said)
    except BadContent as error:
        for problem in error.problems:
            print(f"{problem.pointer or 'the whole content'}: {problem.message}  ({problem.schema})", file=sys.stderr)
        return FAILED
    except MatrixError as error:
        print(f"{error.errcode}: {error.error}", file=sys.stderr)
        return FAILED
    return 0


async def _send(core: Core, room: str, event_type: str, body: bytes) -> str:
    """By way of the store, as everything that is sent: what is accepted is not lost where the homeserver is away.

    Returns the event id; "" when it is queued, which standard error says.
    """
    event = await _checked(core, room, event_type, body)
    patience = core.settings.wait_seconds
    try:
        core.open()
    except StoreInUse:  # a bridge runs, and delivers it: it looks for what is new in a third of a lease
        core = Core(core.settings, beside=True)
        patience += core.settings.lease_seconds / 3
    async with core.running():
        told = await core.sender.send(Credential(None), event, How("flow", request=body), patience)
    if told.error is not None:
        raise told.error
    if told.event_id is None:
        print(_ACCEPTED.format(status=told.status, delivery=told.delivery), file=sys.stderr)
        return ""
    return told.event_id


async def _validate(core: Core, event_type: str, body: bytes) -> str:
    event = await _checked(core, "", event_type, body)
    return json.dumps(json.loads(event.content), indent=2, ensure_ascii=False)


async def _checked(core: Core, room: str, event_type: str, body: bytes) -> Event:
    """The arguments are raw text, not path segments: nothing is percent-decoded."""
    if room:
        identifiers.room(room.replace("%", "%25"))
    identifiers.event_type(event_type.replace("%", "%25"))
    found = core.acceptance.read(body, "text/plain", event_type, "flow")
    return await core.acceptance.check(room, event_type, found, as_state=False)
