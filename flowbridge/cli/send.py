"""The commands that use the core once: `send` and `validate`."""

import asyncio
import json
import secrets
import sys
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from flowbridge import log
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.delivery.attempt import IN_PLAIN_TEXT
from flowbridge.errors import BadContent, Forbidden, MatrixError
from flowbridge.homeserver import answers, paths
from flowbridge.models import Event
from flowbridge.settings import Settings, SettingsError

FAILED = 1


def send(settings: Settings, room: str, event_type: str, body: bytes) -> int:
    """Send one event as the bot account; returns the exit code."""
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
        print(await command)
    except BadContent as error:
        for problem in error.problems:
            print(f"{problem.pointer or 'the whole content'}: {problem.message}  ({problem.schema})", file=sys.stderr)
        return FAILED
    except MatrixError as error:
        print(f"{error.errcode}: {error.error}", file=sys.stderr)
        return FAILED
    return 0


async def _send(core: Core, room: str, event_type: str, body: bytes) -> str:
    event = await _checked(core, room, event_type, body)
    await core.locate()
    caller = await core.callers.identify(Credential(None))
    event = replace(event, room=await core.aliases.joined(caller, room))
    try:
        if await core.carrier.refuses(caller.token, event):
            raise Forbidden(IN_PLAIN_TEXT)
        return answers.event_id(await core.homeserver.send(caller.token, event, secrets.token_urlsafe(16)))
    finally:
        core.homeserver.close()


async def _validate(core: Core, event_type: str, body: bytes) -> str:
    event = await _checked(core, "", event_type, body)
    return json.dumps(json.loads(event.content), indent=2, ensure_ascii=False)


async def _checked(core: Core, room: str, event_type: str, body: bytes) -> Event:
    """The arguments are raw text, not path segments: nothing is percent-decoded."""
    if room:
        paths.room(room.replace("%", "%25"))
    paths.event_type(event_type.replace("%", "%25"))
    found = core.intake.read(body, "text/plain", event_type, "flow")
    return await core.intake.check(room, event_type, found, as_state=False)
