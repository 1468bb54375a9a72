"""A request to a hook becomes messages in its room. Knows nothing of HTTP's answers; `hooks test` calls it, too.

What its sender is to do again is a 503: Alertmanager drops what is answered 429, or any other 4xx, for good. Only a
body that can never be taken is a 4xx. Nothing is lost by a template, nor by what a message cannot have: it is sent
without that, and its history says so.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from flowbridge import metrics
from flowbridge.auth.callers import Callers, Credential
from flowbridge.delivery.pending import KeyBefore
from flowbridge.errors import (
    BadContent,
    BadRequest,
    Errcode,
    HomeserverError,
    MatrixError,
    NotFound,
    Problem,
    TooLarge,
    TooMany,
    Unavailable,
)
from flowbridge.events import message, shaping
from flowbridge.events.canonical_json import is_unicode
from flowbridge.events.message import Attachment, Message
from flowbridge.events.relations import is_name
from flowbridge.events.shaping import Shaped
from flowbridge.events.stories import Chapter
from flowbridge.hooks import body as bodies
from flowbridge.hooks.body import Body
from flowbridge.hooks.registry import Registry
from flowbridge.hooks.requests import Request, Requests
from flowbridge.hooks.trouble import ours
from flowbridge.limits.cache import Cache
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import ApiKey, Rendered
from flowbridge.models.hooks import TEMPLATE_FAILED, Hook, Made, Said
from flowbridge.rendering.processes import KILLED, Rendering
from flowbridge.services.acceptance import Acceptance, How
from flowbridge.services.media.transfer import Transfer
from flowbridge.services.messages import Messages
from flowbridge.services.sending import Sender, Told
from flowbridge.sources.summary import is_secret
from flowbridge.store import clock

LARGE_BYTES = 64 * 1024  # of a body: a larger one is read in a thread
WINDOW_MS = 60_000  # in which the same body again is a repeat, where its sender has no ids of its own
FILES_SECONDS = 5.0  # for the files of a message: senders hang up after 10
TURN_SECONDS = 5.0  # for the template of a hook, one after the other
SUSPECT_SECONDS = 60.0  # for which a template that was ended is not tried again
SUSPECT_PAUSE = 0.05  # before each request to its hook meanwhile: who floods it must not gain by that
SHORT_TEXT = 8_000  # bytes, of a message that does not fit as it is
MAX_NOTES = 5
MAX_NOTE = 500

_TEXTS = ("text", "markdown", "html")


@dataclass(frozen=True, slots=True)
class Done:
    """What was done with a request. `delivery`: of its first message; "" where there is none: `why` says why not.

    `replayed`: it came before. `messages`: how many there are.
    """

    source: str
    delivery: str = ""
    user_id: str = ""
    status: str = ""
    replayed: bool = False
    why: str = ""
    messages: int = 0
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Planned:
    """The events that a request becomes, but for files that are yet to be fetched; what its owner should know of it."""

    shaped: Sequence[Shaped]
    files: Mapping[int, Attachment] = field(default_factory=dict)  # by the number of the event
    warnings: Sequence[str] = ()


class Receiving:
    """For one event loop."""

    def __init__(
        self,
        registry: Registry,
        requests: Requests,
        rendering: Rendering,
        acceptance: Acceptance,
        callers: Callers,
        messages: Messages,
        sender: Sender,
        transfer: Transfer,
    ) -> None:
        self._registry = registry
        self._requests = requests
        self._rendering = rendering
        self._acceptance = acceptance
        self._callers = callers
        self._messages = messages
        self._sender = sender
        self._transfer = transfer
        self._own = Limiter("requests to this hook, whose template is busy", 100_000, 1)
        self._suspects = Cache[object, bool](1_000, SUSPECT_SECONDS)  # templates that were ended

    async def receive(
        self,
        hook: Hook,
        headers: Mapping[str, str],
        raw: bytes,
        limit: int,
        dialect: str = "",
        *,
        is_test: bool = False,
    ) -> Done:
        """Take a request whose sender is known. `dialect`: the source that its path says, where it says one.

        `is_test`: the same again is no repeat, and it belongs to no story.

        Raises BadRequest, TooLarge or UnsupportedMedia for a body that can never be taken, else Unavailable.
        """
        credential = credential_of(hook)
        with ours(whole=True):
            if not self._callers.bot.is_configured:
                raise Unavailable("the bridge has no account to send with: set ACCESS_TOKEN", retry_after_ms=60_000)
            self._acceptance.check_share(credential)
        self._registry.note_use(hook.name)
        shown = without_secrets(headers)
        with ours():
            read = partial(_read, raw, headers, limit)
            is_large = len(raw) >= LARGE_BYTES or bodies.is_compressed(headers)
            body, digest = await self._acceptance.aside(read) if is_large else read()
            try:
                made = await self.make(hook, body, shown, dialect)
            except BadRequest as error:
                self._keep(hook, shown, body, {"error": error.error})
                raise
        if is_test:
            made, digest = _apart(made), secrets.token_hex(16)
        planned = self.plan(hook, made)
        warnings = [*made.warnings, *planned.warnings]
        failure = next((each for each in made.warnings if each.startswith(TEMPLATE_FAILED)), "")
        self._registry.note_failure(hook.name, failure)
        if failure:
            metrics.count(metrics.hook_template_failures, made.source)
        if not planned.shaped:
            self._keep(hook, shown, body, {"done": made.nothing, "source": made.source, "event": made.event})
            return Done(made.source, why=made.nothing, warnings=warnings)
        with ours(whole=True):
            told = await self._send(credential, hook.room, planned, made.delivery_id, digest, warnings)
            if troubles := [each.error for each in (told, *told.following) if each.error]:
                raise troubles[0]  # the store's
        self._keep(
            hook,
            shown,
            body,
            {"delivery_id": told.delivery, "source": made.source, "event": made.event, "warnings": warnings},
        )
        number = 1 + len(told.following)
        return Done(made.source, told.delivery, told.user_id, told.status, told.replayed, "", number, warnings)

    async def make(self, hook: Hook, body: Body, headers: Mapping[str, str], dialect: str = "") -> Made:
        """What a request becomes. `headers`: by lower-case name, without secrets.

        Raises BadRequest for a body that cannot be read, TooMany and Unavailable.
        """
        given = {
            "source": dialect or hook.source,
            "headers": headers,
            "per": hook.per,
            "template": dict(hook.template) if hook.template else None,
            "is_text": body.form == "text",
            "may_be_text": body.form == "either",
            "ignore": hook.ignore,
            "plain": False,
        }
        try:
            if not hook.template:
                return await self._rendered(body.text, given)
            return await self._with_own(hook, body.text, given)
        except BadContent as error:
            problem = error.problems[0]
            errcode = Errcode.NOT_JSON if "not valid JSON" in problem.message else Errcode.BAD_JSON
            raise BadRequest(f"the body {problem.message}", errcode=errcode) from None

    async def _with_own(self, hook: Hook, text: str, given: Mapping[str, Any]) -> Made:
        """By the hook's own template. Once it was ended, what comes after it does not wait for the same.

        One at a time: of a hundred requests that come at once, the first alone takes a second.
        """
        template = (hook.name, *sorted((hook.template or {}).items()))
        with contextlib.suppress(TooMany, Unavailable):  # too many wait for the same: a summary takes no time
            async with self._own.turn(hook.name, TURN_SECONDS):
                if template not in self._suspects:
                    try:
                        return await self._rendering.webhook(text, given)
                    except BadContent as error:
                        if error.problems[0].pointer != KILLED:
                            raise
                        self._suspects.put(template, True)
                else:
                    await asyncio.sleep(SUSPECT_PAUSE)
        return await self._rendering.webhook(text, {**given, "template": None, "plain": True, "was_ended": True})

    async def _rendered(self, text: str, given: Mapping[str, Any]) -> Made:
        """By a template of ours."""
        try:
            return await self._rendering.webhook(text, given)
        except BadContent as error:
            if error.problems[0].pointer != KILLED:
                raise
        return await self._rendering.webhook(text, {**given, "plain": True})

    def plan(self, hook: Hook, made: Made) -> Planned:
        """The events of a request."""
        shaped: list[Shaped] = []
        files: dict[int, Attachment] = {}
        warnings: list[str] = []
        for said in made.messages:
            found, problems = _message(hook, said)
            warnings += problems
            if found is None:
                continue
            events = shaping.shape(found, said.rendered)
            if found.key:
                digest = self._acceptance.at_rest.mark(said.digest)
                chapter = Chapter(said.state, said.firing, said.time, digest, said.ended)
                first = events[0]
                events[0] = Shaped(first.type, first.content, first.binding.telling(chapter))
            start = len(shaped) + len(events) - len(found.attachments)
            files |= {start + number: file for number, file in enumerate(found.attachments)}
            shaped += events
        if made.messages and not shaped:
            raise BadRequest("the body has nothing to say")
        return Planned(shaped, files, warnings)

    async def _send(
        self,
        credential: Credential,
        room: str,
        planned: Planned,
        delivery_id: str,
        digest: str,
        warnings: Sequence[str],
    ) -> Told:
        notes = tuple(text[:MAX_NOTE] for text in warnings[:MAX_NOTES])
        before: KeyBefore | None = None
        if delivery_id:
            name = delivery_id if is_name(delivery_id) else hashlib.sha256(delivery_id.encode()).hexdigest()
            key = f"id:{name}"
        else:
            now, digest = clock.now_ms(), self._acceptance.at_rest.mark(digest)
            minute = now // WINDOW_MS
            key, before = f"body:{digest}:{minute}", KeyBefore(f"body:{digest}:{minute - 1}", now - WINDOW_MS)
        how = How("flow", key, waits=False, meaning=b"", before=before, notes=notes, is_patient=True)
        if planned.files:
            room = await self._messages.room(credential, room)
            told = await self._sender.repeat(credential, room, shaping.MESSAGE, how, len(planned.shaped), 0.0)
            if told is not None:
                return told  # nothing is fetched again
            planned, more = await self._with_files(credential, room, planned)
            how = replace(how, notes=(*notes, *more)[:MAX_NOTES])
        for less in (list, _alone):
            try:
                return await self._messages.send(credential, room, less(planned.shaped), how, 0.0)
            except (BadRequest, TooLarge, NotFound) as error:  # what it refers to is not there, or it is too long
                how = replace(how, notes=(*how.notes, f"sent without what it cannot have: {error.error}")[:MAX_NOTES])
        return await self._messages.send(credential, room, _least(planned.shaped), how, 0.0)

    async def _with_files(self, credential: Credential, room: str, planned: Planned) -> tuple[Planned, list[str]]:
        """With the files that come within some seconds; in place of another one its address is sent.

        Raises what the homeserver says: it takes them later.
        """
        caller, room_id = await self._messages.enter(credential, room)
        shaped, notes = list(planned.shaped), list[str]()
        deadline = asyncio.get_running_loop().time() + FILES_SECONDS
        for number, file in planned.files.items():
            if file.is_here:
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    stored = await self._transfer.bring(caller, room_id, file, "/attachments")
                shaped[number] = shaping.with_content(shaped[number], shaping.file(stored))
            except (BadContent, TooLarge, HomeserverError, TimeoutError) as error:
                if isinstance(error, HomeserverError) and not _is_refused(error):
                    raise
                why = error.error if isinstance(error, MatrixError) else f"it takes longer than {FILES_SECONDS:g} s"
                name = file.filename or file.caption or "a file"
                text = "\n".join(filter(None, (f"{name} could not be attached", file.url)))
                shaped[number] = shaping.with_content(shaped[number], shaping.shape(Message(source=text))[0].content)
                notes.append(f"{name} could not be attached: {why}")
        return replace(planned, shaped=shaped), notes

    def _keep(self, hook: Hook, headers: Mapping[str, str], body: Body, outcome: Mapping[str, Any]) -> None:
        if hook.keep_requests:
            self._requests.note(hook, Request(headers, body.text, body.form == "text", outcome))


def credential_of(hook: Hook) -> Credential:
    """A hook is a caller of its own, and acts as the bot."""
    rooms = () if hook.room.startswith("@") else (hook.room,)  # the direct room has another name
    return Credential(None, ApiKey(hook.owner, hook.name, rooms, (shaping.MESSAGE,)))


def without_secrets(headers: Mapping[str, str]) -> dict[str, str]:
    """What a template sees of the headers, and what is kept of them."""
    return {name: value for name, value in headers.items() if not _is_hidden(name)}


@lru_cache(1_000)
def _is_hidden(name: str) -> bool:
    if is_secret(name):
        return True
    return "signature" in name or (name.endswith(("-key", "-auth")) and name != "idempotency-key")


def _read(raw: bytes, headers: Mapping[str, str], limit: int) -> tuple[Body, str]:
    return bodies.read(raw, headers, limit), hashlib.sha256(raw).hexdigest()


def _apart(made: Made) -> Made:
    """The same, without what ties it to other requests."""
    messages = []
    for said in made.messages:
        members = {name: value for name, value in said.members.items() if name not in ("key", "on_update")}
        messages.append(replace(said, members=members, key=""))
    return replace(made, messages=tuple(messages), delivery_id="")


def _message(hook: Hook, said: Said) -> tuple[Message | None, list[str]]:
    """The message, without what it cannot have; None where there is nothing to say."""
    text, mentions = said.rendered.body, _mentions(hook, said)
    if not said.members and text.strip() and "\0" not in text and is_unicode(text):  # most: there is nothing to read
        users = tuple(each for each in mentions if each != message.ROOM)
        key, on_update = _named(said.key), hook.on_update if said.key else "edit"
        mentions_room = message.ROOM in mentions
        return Message(source=text, users=users, mentions_room=mentions_room, key=key, on_update=on_update), []
    members = {name: value for name, value in said.members.items() if value is not None and name not in _TEXTS}
    if text.strip():
        members["text"] = text
    members["mentions"] = mentions
    members.pop("key", None)
    if said.key and "edit" not in members:
        members["key"] = _named(said.key)
        members.setdefault("on_update", hook.on_update)
    if not members["mentions"]:
        del members["mentions"]
    problems: list[str] = []
    while "text" in members or members.get("attachments"):
        try:
            return message.read(members), problems
        except BadContent as error:
            problems += [f"{problem.pointer.lstrip('/')} {problem.message}" for problem in error.problems]
            members = _without(members, error.problems)
    return None, problems


def _named(key: str) -> str:
    return key if not key or is_name(key) else hashlib.sha256(key.encode()).hexdigest()


def _without(members: Mapping[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    """Without the members, and files, that are wrong."""
    wrong = {problem.pointer.split("/")[1] for problem in problems if problem.pointer}
    kept = {name: value for name, value in members.items() if name not in wrong}
    files = members.get("attachments")
    if "attachments" in wrong and isinstance(files, list):
        at = {problem.pointer.split("/")[2] for problem in problems if problem.pointer.count("/") > 1}
        if at and (left := [file for number, file in enumerate(files) if str(number) not in at]):
            kept["attachments"] = left
    return kept if wrong else {}


def _mentions(hook: Hook, said: Said) -> list[str]:
    """Who is pinged: whoever has the URL must not decide that, unless the hook's owner says so."""
    found: list[str] = []
    if hook.mentions == "template":
        asked = said.members.get("mentions") or []
        asked = asked.split(",") if isinstance(asked, str) else asked if isinstance(asked, list) else []
        asked = [each.strip() for each in asked if isinstance(each, str)]
        found = [each for each in asked if each == message.ROOM or message.is_user_id(each)]
    if hook.mentions != "never" and said.state == "firing":
        found += hook.mention
    return list(dict.fromkeys(found))[: message.MAX_MENTIONS]


def _is_refused(error: HomeserverError) -> bool:
    """Whether the homeserver does not take this file: later it will not either."""
    return 400 <= error.status < 500 and error.status not in (401, 429)


def _alone(shaped: Sequence[Shaped]) -> list[Shaped]:
    """The same events without what they refer to."""
    return [replace(each, binding=replace(each.binding, reply_to=None, thread=None, edit=None)) for each in shaped]


def _least(shaped: Sequence[Shaped]) -> list[Shaped]:
    """The same events with the beginning of their texts alone."""
    found = []
    for event in _alone(shaped):
        body = str(event.content.get("body", ""))
        cut = body.encode("utf-8", "replace")[:SHORT_TEXT].decode("utf-8", "ignore")
        content = event.content if "url" in event.content else _text(cut if cut == body else f"{cut}…", event)
        found.append(replace(event, content=content))
    return found


def _text(text: str, event: Shaped) -> dict[str, Any]:
    content = shaping.shape(Message(source=text), Rendered(text))[0].content
    return {**content, "msgtype": event.content["msgtype"], "m.mentions": event.content["m.mentions"]}
