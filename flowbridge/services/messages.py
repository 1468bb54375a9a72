"""Say something as people write it: a message becomes events, which are sent as any others (services/sending.py)."""

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from flowbridge.auth import scopes
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.delivery import Worker
from flowbridge.delivery.encryption import ENCRYPTED_BYTES
from flowbridge.errors import (
    BadContent,
    BadGateway,
    Errcode,
    GatewayTimeout,
    HomeserverError,
    NotFound,
    Problem,
    TooLarge,
    Unavailable,
)
from flowbridge.events import canonical_json, message, message_body, shaping, size
from flowbridge.events.message import RULE, Attachment, Message
from flowbridge.events.relations import NONE, Binding, largest
from flowbridge.events.shaping import Shaped
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import ApiKey, Caller, Event, Payload
from flowbridge.rendering.processes import Rendering
from flowbridge.services.acceptance import Acceptance, How, is_large
from flowbridge.services.direct_rooms import DirectRooms
from flowbridge.services.media import form
from flowbridge.services.media.attachment import essence
from flowbridge.services.media.files import Media
from flowbridge.services.media.form import FormFile
from flowbridge.services.media.transfer import Encrypts, Transfer
from flowbridge.services.sending import Sender, Told
from flowbridge.services.targets import Targets
from flowbridge.store.accounts import account_of

T = TypeVar("T")
_IS_OPEN = attrgetter("binding.is_open")
Json = Mapping[str, Any]
Later = Callable[[], Coroutine[Any, Any, Payload]]  # a content that is yet to be rendered

MAX_LARGE = 4  # bodies with files inside at a time
TURN_SECONDS = 30.0
SHORT = 4_000  # characters of a content that are not counted in bytes: it is written as JSON for that
MAX_SOURCE = {"markdown": 16 * 1024, "html": 32 * 1024}  # bytes: what takes the libraries longer is no message
_FILES = {  # a text that is too long, as a file; HTML is not shown by those who open it
    "text": ("message.txt", "text/plain"),
    "markdown": ("message.md", "text/markdown"),
    "html": ("message.txt", "text/plain"),
}


class Messages:
    """Every method raises MatrixError; then nothing was accepted."""

    def __init__(
        self,
        acceptance: Acceptance,
        sender: Sender,
        callers: Callers,
        room_access: RoomAccess,
        worker: Worker,
        rendering: Rendering,
        direct_rooms: DirectRooms,
        media: Media,
        transfer: Transfer,
        targets: Targets,
        encrypts: Encrypts,
    ) -> None:
        self._acceptance = acceptance
        self._sender = sender
        self._callers = callers
        self._room_access = room_access
        self._worker = worker
        self._rendering = rendering
        self._direct_rooms = direct_rooms
        self._media = media
        self._transfer = transfer
        self._targets = targets
        self._encrypts = encrypts
        self._large = Limiter("messages with files inside that are being read", MAX_LARGE, 1)

    @contextlib.asynccontextmanager
    async def large(self, credential: Credential) -> AsyncIterator[None]:
        """A place for a body with a file inside, which is in memory as a whole. Raises Unauthorized, TooMany …"""
        await self._callers.author(credential)
        async with self._large.turn(peer.who(), TURN_SECONDS):
            yield

    async def read(self, body: bytes, content_type: str, options: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """A message object from a body of any form."""
        return await self._aside(body, partial(message_body.read, body, content_type, options))

    def at_once(self, body: bytes, content_type: str) -> Payload | Later | None:
        """The content for a message of one event that refers to nothing, or how to have it rendered; None for others.

        Raises as `read` and `say` do.
        """
        if essence(content_type) == "multipart/form-data":
            return None
        said = message.read(message_body.read(body, content_type))
        if said.overflow or said.attachments or said.binding is not NONE:
            return None
        if said.format != "text":
            check_source(said)
            return partial(self._rendered_content, said)
        (shaped,) = shaping.shape(said)
        return Payload(shaped.content)

    async def _rendered_content(self, said: Message) -> Payload:
        rendered = await self._rendering.render(said.format, said.source, said.users)
        (shaped,) = shaping.shape(said, rendered)
        return Payload(shaped.content)

    async def read_object(self, body: bytes) -> dict[str, Any]:
        return await self._aside(body, partial(message_body.read_object, body))

    async def _aside(self, body: bytes, read: Callable[[], T]) -> T:
        """A large body is read in a thread."""
        return await self._acceptance.aside(read) if is_large(body) else read()

    @contextlib.asynccontextmanager
    async def form(
        self, credential: Credential, body: AsyncIterable[bytes], content_type: str, options: Sequence[tuple[str, str]]
    ) -> AsyncIterator[tuple[dict[str, Any], Sequence[FormFile]]]:
        """A message object, and the files beside it, from a form. The files are there until the context ends."""
        scopes.permit(credential.key, shaping.MESSAGE)
        caller = await self._callers.author(credential)  # before anything is written to the disk
        most = await self._transfer.most(caller)
        async with form.read(body, content_type, self._media.spool, most) as found:
            yield message_body.read_form(found.fields, options), found.files

    async def say(
        self,
        credential: Credential,
        room: str,
        value: Json,
        how: How,
        patience: float,
        files: Sequence[FormFile] = (),
    ) -> Told:
        """Send a message. `how` is that of its first event; `files` came beside it, in a form."""
        scopes.permit(credential.key, shaping.MESSAGE)
        said = message.read(value, [_attachment(file) for file in files] if files else ())
        attachments: Sequence[Attachment] = said.attachments
        if said.format == "text" and not said.overflow:  # nothing to render, and nothing to cut
            shaped = shaping.shape(said)
        else:
            shaped, attachments = await self._shape(credential, room, said)
        if files:  # the same form again is the same message
            value = {**value, "attachments": [_meaning(each) for each in files]}
        how = _meant(how, value)
        return await self.send(credential, room, shaped, how, patience, attachments, said.binding)

    async def react(self, credential: Credential, room: str, value: Json, how: How, patience: float) -> Told:
        scopes.permit(credential.key, shaping.REACTION)
        reaction = message.read_reaction(value)
        binding = Binding(reacts=reaction.target)
        shaped = [shaping.react(reaction)]
        return await self.send(credential, room, shaped, _meant(how, value), patience, binding=binding)

    async def redact(self, credential: Credential, room: str, value: Json, how: How, patience: float) -> Told:
        scopes.permit(credential.key, shaping.REDACTION)
        redaction = message.read_redaction(value)
        binding = Binding(redacts=redaction.target)
        shaped = [shaping.redact(redaction)]
        return await self.send(credential, room, shaped, _meant(how, value), patience, binding=binding)

    async def send(
        self,
        credential: Credential,
        room: str,
        shaped: Sequence[Shaped],
        how: How,
        patience: float,
        attachments: Sequence[Attachment] = (),
        binding: Binding = NONE,
    ) -> Told:
        """Send the events of a message, the last of which are its files.

        `binding`: what it refers to; the events that it names are looked for.
        """
        if room.startswith("@"):
            room = await self.room(credential, room, shaped[0].type)
        if any(map(_IS_OPEN, shaped)):
            await self._check_bindings(credential, room, shaped)
        if binding is not NONE and (
            named := {
                _pointer(name): target.name for name, target in binding.targets().items() if target.kind == "event"
            }
        ):
            permit = partial(scopes.permit, credential.key, shaped[0].type)
            caller, room_id = await self._room_access.enter(credential, room, permit, joins=True, writes=True)
            await self._targets.check(caller, room_id, named)
        if attachments and not all(file.is_here for file in attachments):
            if (
                told := await self._sender.repeat(credential, room, shaping.MESSAGE, how, len(shaped), patience)
            ) is not None:
                return told  # nothing is fetched again
            shaped = await self._with_files(credential, room, shaped, attachments)
        events = [await self._event(room, event) for event in shaped]
        return await self._sender.send_together(credential, events, how, patience)

    async def room(self, credential: Credential, room: str, event_type: str = shaping.MESSAGE) -> str:
        """The room, where it may be a user: the direct room with that one."""
        if not room.startswith("@"):
            return room
        scopes.permit(credential.key, event_type)
        return await self._direct_rooms.room(credential, room)

    async def enter(self, credential: Credential, room: str) -> tuple[Caller, str]:
        """Who may say something in a room, and the room's id."""
        permit = partial(scopes.permit, credential.key, shaping.MESSAGE)
        return await self._room_access.enter(credential, room, permit, joins=True, writes=True)

    async def _with_files(
        self, credential: Credential, room: str, shaped: Sequence[Shaped], attachments: Sequence[Attachment]
    ) -> Sequence[Shaped]:
        """The events with the files of the message, which the homeserver has then.

        Nothing is uploaded for a message that would be refused: its text is checked first, and the caller's right.
        """
        texts, files = shaped[: -len(attachments)], shaped[-len(attachments) :]
        caller, room_id = await self.enter(credential, room)
        for text in texts:
            event = await self._event(room, text)
            size.check(event.content, event.type, None, room_id, caller.user_id)
        found = []
        cut = sum(isinstance(file.data, bytes) for file in attachments)  # the file of a text comes first
        for number, (shown, file) in enumerate(zip(files, attachments, strict=True), -cut):
            stored = await self._transfer.bring(caller, room_id, file, f"/attachments/{number}")
            found.append(shaping.with_content(shown, shaping.file(stored)))
        return [*texts, *found]

    def _event(self, room: str, shaped: Shaped) -> Awaitable[Event]:
        """The event that would be sent. One that is yet to be bound is checked as large as it can become."""
        if not shaped.binding.is_open:
            return self._acceptance.check(room, shaped.type, Payload(shaped.content), as_state=False)
        return self._open_event(room, shaped)

    async def _open_event(self, room: str, shaped: Shaped) -> Event:
        found = Payload(largest(shaped.content, shaped.binding))
        event = await self._acceptance.check(room, shaped.type, found, as_state=False, kept=shaped.content)
        return Event(room, event.type, event.content, None, shaped.binding.to_json())

    # texts

    async def _shape(
        self, credential: Credential, room: str, said: Message
    ) -> tuple[list[Shaped], Sequence[Attachment]]:
        """The events of a message, and the files that the last of them are for."""
        if not said.overflow or not said.source:
            check_source(said)
            return await self._rendered(credential, said), said.attachments
        try:
            check_source(said)
            shaped = await self._rendered(credential, said)
            _check_size(shaped)
            await self._check_encrypted_size(credential, room, shaped)
        except TooLarge:
            if said.edit is not None:
                raise  # an edit has no files
            return await self._cut(credential, said)
        return shaped, said.attachments

    async def _check_encrypted_size(self, credential: Credential, room: str, shaped: Sequence[Shaped]) -> None:
        """Raises TooLarge for what fits into a plain room, but not into this one, which is encrypted.

        As far as that can be learnt: otherwise it is found out when the event's turn comes.
        """
        if max(map(_length, shaped)) <= ENCRYPTED_BYTES:
            return
        with contextlib.suppress(HomeserverError, BadGateway, GatewayTimeout, Unavailable):
            caller, room_id = await self.enter(credential, await self.room(credential, room))
            if await self._encrypts(caller, room_id):
                raise TooLarge(f"the room is encrypted: at most about {ENCRYPTED_BYTES} bytes of content fit")

    async def _rendered(self, credential: Credential, said: Message) -> list[Shaped]:
        if said.format == "text" or not said.source:
            return shaping.shape(said)
        await self._callers.author(credential)  # so that it counts in somebody's share
        rendered = await self._rendering.render(said.format, said.source, said.users)
        return shaping.shape(said, rendered)

    async def _cut(self, credential: Credential, said: Message) -> tuple[list[Shaped], Sequence[Attachment]]:
        """A text that is too long: its beginning, and all of it as a file."""
        shaped = await self._rendered(credential, shaping.cut(said))  # first: it may be refused
        _check_size(shaped)
        filename, mimetype = _FILES[said.format]
        file = Attachment(filename=filename, mimetype=f"{mimetype}; charset=utf-8", data=said.source.encode())
        shown = Shaped(shaping.MESSAGE, shaping.file(file), said.later_binding).bound
        return [shaped[0], shown, *shaped[1:]], [file, *said.attachments]

    # targets

    async def _check_bindings(self, credential: Credential, room: str, shaped: Sequence[Shaped]) -> None:
        """Raises NotFound for a delivery that is not there, BadContent for one of another room, TooLarge."""
        long = [event for event in shaped if event.binding.is_open and not _is_short(event.content)]
        named = {
            _pointer(name): target.name
            for event in shaped
            for name, target in event.binding.targets().items()
            if target.kind == "delivery"
        }
        if not (long or named):
            return
        permit = partial(scopes.permit, credential.key, shaped[0].type)
        caller, room_id = await self._room_access.enter(credential, room, permit, joins=True, writes=True)
        for event in long:
            content = canonical_json.write(largest(event.content, event.binding))
            if len(content) > size.SMALL_BYTES:
                size.check(content, event.type, None, room_id, caller.user_id)
        if named:
            await self._check_deliveries(caller, room_id, named)

    async def _check_deliveries(self, caller: Caller, room_id: str, named: Mapping[str, str]) -> None:
        """`named`: delivery ids by the pointers to them."""
        rows = await self._worker.rows(list(named.values()))
        for pointer, delivery in named.items():
            row = rows.get(delivery)
            if row is None or not _is_theirs(row, caller, caller.key):
                message = f"there is no delivery {delivery} of yours: it may have been deleted"
                problem = Problem(pointer, message, RULE)
                error = BadContent([problem])
                raise NotFound(error.error, errcode=Errcode.NOT_FOUND, **error.extra)
            if row["room_id"] != room_id:
                message = f"is a delivery to another room, {row['room_id']}"
                raise BadContent([Problem(pointer, message, RULE)])


def _is_short(content: Mapping[str, Any]) -> bool:
    """Whether it fits in any case: an edit holds its text twice, and a character takes 6 bytes of JSON at most."""
    length = 0
    for value in content.values():
        if value and not isinstance(value, str):
            return False
        length += len(value)
    return length < SHORT


def _meant(how: How, value: Json) -> How:
    """A repeat under the same key is one of the same message, whatever that is rendered to by then."""
    return how if how.key is None else replace(how, meaning=canonical_json.write(value))


def check_source(said: Message) -> None:
    """Raises TooLarge for a text that is not rendered."""
    limit = MAX_SOURCE.get(said.format)
    if limit is not None and (length := len(said.source.encode())) > limit:
        raise TooLarge(
            f"{said.format}: it is {length} bytes long, and at most {limit} are rendered: send it as a file, in parts, "
            'or with "overflow": "file"'
        )


def _attachment(file: FormFile) -> Attachment:
    mimetype = essence(file.label.content_type)
    return Attachment(filename=file.label.filename, mimetype=mimetype, caption=file.caption, data=file.spool)


def _meaning(file: FormFile) -> Json:
    found = {"filename": file.label.filename, "sha256": file.sha256}
    return {**found, "caption": file.caption} if file.caption else found


def _check_size(shaped: Sequence[Shaped]) -> None:
    """Raises TooLarge, for any room and sender."""
    for event in shaped:
        if (length := _length(event)) > size.SMALL_BYTES:
            raise TooLarge(f"the content is {length} bytes of canonical JSON")


def _length(event: Shaped) -> int:
    """Bytes of its content, as large as it can become."""
    return len(canonical_json.write(largest(event.content, event.binding)))


def _is_theirs(row: Mapping[str, Any], caller: Caller, key: ApiKey | None) -> bool:
    """Whether the caller may know of a delivery, and is its sender: keys share the bot's account."""
    if row["account"] != account_of(caller.user_id):
        return False
    return bool(row["api_key"] == (key.id if key else None) or (key and key.admin))


def _pointer(name: str) -> str:
    return "/target" if name in ("reacts", "redacts") else f"/{name}"
