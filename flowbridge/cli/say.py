"""`flowbridge send --text …`: a message as people write it, by way of the same core as the server (contract §5)."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.cli import Usage
from flowbridge.cli.files import File, copies
from flowbridge.cli.send import bot_core, key_of, reported, through_the_store
from flowbridge.errors import MatrixError, Problem
from flowbridge.events import message
from flowbridge.events.message import FORMATS, Attachment
from flowbridge.events.payload import decoded
from flowbridge.homeserver import identifiers
from flowbridge.services.acceptance import How
from flowbridge.services.messages import check_source
from flowbridge.services.sending import Told
from flowbridge.settings import Settings

STDIN = "-"

_NOTHING = "there is nothing to say: give --text, --markdown, --html or --file, or pipe a text in"
_OPTIONS = {"mentions": "--mention", "reply_to": "--reply-to", "on_update": "--on-update", "attachments": "--file"}


def said(given: Mapping[str, Any], *, files: bool, reads: bool) -> dict[str, Any]:
    """The message object that the options mean, without its files. Raises Usage.

    `reads`: the text is on standard input. So it is, too, where there is nothing else to say and somebody pipes it in.
    """
    value = {name: item for name, item in given.items() if item is not None and item != []}
    texts = [name for name in FORMATS if name in value]
    if reads and texts:
        raise Usage(f"- is the text on standard input, and --{texts[0]} another one: a message has one text")
    if len(texts) > 1:
        raise Usage(f"--{texts[1]}: there is --{texts[0]} already, and a message has one text")
    if not texts and not reads and not files:
        if sys.stdin.isatty():
            raise Usage(_NOTHING)
        reads = True
    if reads:
        return {"text": _read(), **value}
    return {**value, **{name: _read() for name in texts if value[name] == STDIN}}


def run(settings: Settings, room: str, value: Mapping[str, Any], files: Sequence[File], key: str | None) -> int:
    """Send a message as the bot account; returns the exit code: 0 also when it is queued, since it will be sent."""
    in_words = partial(_in_words, files)
    return asyncio.run(reported(_say(settings, room, value, files, key_of(key)), in_words))


async def _say(settings: Settings, room: str, value: Mapping[str, Any], files: Sequence[File], key: str | None) -> str:
    """What is known to be wrong without the homeserver is told before it is asked."""
    identifiers.room_or_user(room.replace("%", "%25"))
    found = message.read(value, [Attachment() for _ in files])
    if not found.overflow:
        check_source(found)
    how = How("flow", key, json.dumps(value, ensure_ascii=False).encode())
    bot = Credential(None)

    async def say(core: Core, patience: float) -> Told:
        if not files:
            return await core.messages.say(bot, room, value, how, patience)
        most = await core.transfer.most(await core.callers.author(bot))
        async with copies(files, most) as copied:
            return await core.messages.say(bot, room, value, how, patience, copied)

    return await through_the_store(bot_core(settings), say)


def _read() -> str:
    """Standard input as a text: a program ends its output with a line break, which is not part of it."""
    try:
        text = decoded(sys.stdin.buffer.read(), "").rstrip("\r\n")
    except MatrixError as error:
        raise Usage(f"standard input: {error.error}") from None
    if not text.strip():
        raise Usage("standard input is empty: there is nothing to say")
    return text


def _in_words(files: Sequence[File], problem: Problem) -> str:
    """By the option that the pointer leads to."""
    _, name, index, *_ = [*problem.pointer.split("/"), "", ""]
    if name == "attachments" and index:
        return f"--file {files[int(index)].path}: {problem.message}"
    return f"{_OPTIONS.get(name, f'--{name}') if name else 'the message'}: {problem.message}"
