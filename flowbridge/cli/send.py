"""`flowbridge send` and `flowbridge validate`: one event, by way of the same core as the server."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from flowbridge import log
from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.cli import FAILED, Usage
from flowbridge.cli.terminal import as_json, note
from flowbridge.errors import BadContent, MatrixError, Problem
from flowbridge.homeserver import identifiers
from flowbridge.models import Event
from flowbridge.services.acceptance import How
from flowbridge.services.sending import Told
from flowbridge.settings import Settings, SettingsError
from flowbridge.store.engine import place
from flowbridge.store.errors import StoreInUse

InWords = Callable[[Problem], str]

_ACCEPTED = """{status}: what is queued is sent, in its turn, by a flowbridge that runs on {database}.
`flowbridge deliveries show {delivery}` says how it ends. Do not send it again."""


def _by_pointer(problem: Problem) -> str:
    return f"{problem.pointer or 'the whole content'}: {problem.message}  ({problem.schema})"


def send(settings: Settings, room: str, event_type: str, body: bytes, key: str | None = None) -> int:
    """Send one event as the bot account; returns the exit code: 0 also when it is queued, since it will be sent."""
    return asyncio.run(reported(_send(bot_core(settings), room, event_type, body, key_of(key))))


def validate(settings: Settings, event_type: str, body: bytes) -> int:
    """Check a payload; returns the exit code."""
    return asyncio.run(reported(_validate(_core(settings), event_type, body)))


def bot_core(settings: Settings) -> Core:
    if not settings.has_bot:
        raise SettingsError(
            "ACCESS_TOKEN: `send` acts as the bot account: set it, or FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD"
        )
    return _core(settings)


def key_of(text: str | None) -> str | None:
    """An Idempotency-Key. Raises Usage."""
    try:
        return None if text is None else identifiers.identifier(text, "--idempotency-key")
    except MatrixError as error:
        raise Usage(error.error) from None


def _core(settings: Settings) -> Core:
    log.setup(settings.log_format, "warning")
    return Core(settings)


async def reported(command: Coroutine[Any, Any, str], in_words: InWords = _by_pointer) -> int:
    """Print what a command returns, or why it failed. Returns the exit code."""
    try:
        if result := await command:
            print(result)
    except BadContent as error:
        for problem in error.problems:
            note(in_words(problem))
        return FAILED
    except MatrixError as error:
        note(f"{error.errcode}: {error.error}")
        return FAILED
    return 0


async def _send(core: Core, room: str, event_type: str, body: bytes, key: str | None) -> str:
    event = await _checked(core, room, event_type, body)

    async def send(core: Core, patience: float) -> Told:
        return await core.sender.send(Credential(None), event, How("flow", key, request=body), patience)

    return await through_the_store(core, send)


async def through_the_store(core: Core, send: Callable[[Core, float], Awaitable[Told]]) -> str:
    """By way of the store, as every send: an accepted event is not lost while the homeserver is away.

    Returns the event ids, each on a line; "" when all is queued. Standard error reports what is queued, or failed.
    """
    patience = core.settings.wait_seconds
    try:
        core.open(required=True)  # nobody would ever send what is queued in a new one
    except StoreInUse:  # a bridge runs, and delivers it: it polls for new events three times in a lease
        core = Core(core.settings, beside=True)
        patience += core.settings.lease_seconds / 3
    async with core.running():
        told = await send(core, patience)
    return _outcome(told, place(core.database.url))


def _outcome(first: Told, database: str) -> str:
    """Raises the error only if no event of a message is in the room, or will be: who hears one sends it again."""
    events = (first, *first.following)
    sent = [told.event_id for told in events if told.event_id is not None]
    unsettled = [told for told in events if told.status]
    failed = [(told, told.error) for told in events if told.error is not None]
    if failed and not sent and not unsettled:
        raise failed[0][1]
    for told in events:
        for entry in told.history:
            if "note" in entry:
                note(f"note: {entry['note']}")
    for told, error in failed:
        note(f"delivery {told.delivery} is not in the room: {error.errcode}: {error.error}")
    if unsettled:
        note(_ACCEPTED.format(status=unsettled[0].status, delivery=unsettled[0].delivery, database=database))
    return "\n".join(sent)


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
