"""Messages as people write them, reactions and redactions: contract §5. On the flow surface only.

The handlers are raw, as those of a send are: a message may be a text, a form or JSON.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge.auth.callers import Credential
from flowbridge.bridge import Core
from flowbridge.events import shaping
from flowbridge.homeserver import identifiers
from flowbridge.services.acceptance import How
from flowbridge.services.media.attachment import essence
from flowbridge.services.sending import Told
from flowbridge.web import parameters
from flowbridge.web.dependencies import ROOM, credential, segment
from flowbridge.web.endpoint import (
    LOG,
    MAX_BODY_BYTES,
    RECEIPT,
    JsonAnswer,
    error_answer,
    headers_of,
    json_answer,
    read_body,
)
from flowbridge.web.parameters import query
from flowbridge.web.routes.deliveries import Id
from flowbridge.web.routes.send import ACCEPTED, DELIVERY, idempotency_key, key_of, outcome_of, prefer, preference
from flowbridge.web.routing import BODY, TAGS, RawRoute, Route

Json = dict[str, Any]
Options = Sequence[tuple[str, str]]  # in the query
Say = Callable[[Credential, str, Mapping[str, Any], How, float], Awaitable[Told]]

MAX_LARGE_BYTES = 8 * 1024 * 1024  # of a JSON message with a file inside: a form, or POST /media, takes larger ones
MAX_KEPT_BYTES = 64 * 1024  # of a body that the delivery log keeps

_TARGET = "An event id (`$…`), the id of a delivery, or `key:NAME`."

EventIdText = Annotated[str, Field(examples=["$YUwRidLecu:example.com"])]


class Failed(TypedDict):
    delivery_id: Id
    errcode: str
    error: str


class MessageRemarks(TypedDict, total=False):
    notes: Annotated[list[str], Field(description="What could not be as it was asked for.")]
    failed: Annotated[list[Failed], Field(description="Events of the message that are not in the room.")]


class Said(TypedDict):
    """The message is in the room."""

    event_id: Annotated[EventIdText | None, Field(description="Of its first event.")]
    events: Annotated[list[EventIdText], Field(description="Of all its events, in order.")]
    delivery_id: Id
    flowbridge: NotRequired[MessageRemarks]


class FileInfo(TypedDict, total=False):
    """What is known of a file."""

    mimetype: str
    size: Annotated[int, Field(description="In bytes.", ge=0)]
    w: Annotated[int, Field(description="Of a picture or a video, in pixels.", ge=0)]
    h: Annotated[int, Field(description="Likewise.", ge=0)]
    duration: Annotated[int, Field(description="In milliseconds.", ge=0)]


class File(TypedDict, total=False):
    """One of `url`, `data` and `content_uri`."""

    url: Annotated[
        str,
        Field(
            description="It is fetched from there, if that is on the internet.", examples=["https://example.org/a.png"]
        ),
    ]
    data: Annotated[str | Json, Field(description="Base64, a `data:` URL, or a Node-RED Buffer.")]
    content_uri: Annotated[str, Field(description="As `POST /media` answers.", examples=["mxc://example.org/abc"])]
    filename: str
    mimetype: Annotated[
        str, Field(description="Otherwise the server, or the filename, says it.", examples=["image/png"])
    ]
    caption: str
    info: Annotated[FileInfo, Field(description="Beside `content_uri`: as `POST /media` answers.")]


class MessageObject(TypedDict, total=False):
    """One of `text`, `markdown` and `html`, unless there are attachments. Unknown keys are refused."""

    text: str
    markdown: Annotated[str, Field(description="CommonMark with tables and strikethrough, up to 16 KiB.")]
    html: Annotated[str, Field(description="Up to 32 KiB; cut to the tags and attributes that Matrix has.")]
    title: Annotated[str, Field(description="A first line in bold.")]
    msgtype: Literal["m.text", "m.notice", "m.emote"]
    mentions: Annotated[
        list[str], Field(description="Whom to ping: user ids and `@room`. Nobody else is.", examples=[["@al:hs"]])
    ]
    reply_to: Annotated[str, Field(description=f"Answer this message. {_TARGET}")]
    thread: Annotated[str, Field(description=f"The thread of this message. {_TARGET}")]
    edit: Annotated[str, Field(description=f"Replace the text of this message. {_TARGET}")]
    key: Annotated[
        str,
        Field(description="What the message is about: the next one with this key updates it.", examples=["build 17"]),
    ]
    on_update: Literal["edit", "thread", "reply", "new"]
    attachments: Annotated[list[File], Field(description="Files, sent after the text.")]
    overflow: Annotated[
        Literal["file"], Field(description="Send a text that is too long as a file, with its beginning as the text.")
    ]


class ReactionObject(TypedDict):
    target: Annotated[str, Field(description=_TARGET, examples=["key:build 17"])]
    key: Annotated[str, Field(description="What is shown.", examples=["✅"])]


class RedactionObject(TypedDict):
    target: Annotated[str, Field(description=_TARGET, examples=["key:build 17"])]
    reason: NotRequired[str]


class Messages:
    """The handlers."""

    def __init__(self, core: Core) -> None:
        self._acceptance = core.acceptance
        self._callers = core.callers
        self._messages = core.messages
        self._sender = core.sender
        self._wait_seconds = core.settings.wait_seconds

    async def say(self, request: Request) -> Response:
        """Say something

        A text, Markdown or HTML, with a title, mentions, a reply, a thread or an edit, as Matrix clients write it, and
        files. A body that is not a JSON object is the text itself, whatever its Content-Type, and the query says the
        rest; a form may hold files. A target that is queued gets its event id when this message's turn comes.
        """
        if (accepted := request.scope.get(RECEIPT)) is not None:
            request.path_params["eventType"] = shaping.MESSAGE  # as below
            return _answer(request, await outcome_of(self._sender, accepted), is_async=accepted.is_async)
        asked = await self._asked(request, shaping.MESSAGE)
        content_type = asked.headers.get("content-type", "")
        given: bytes = request.scope["query_string"]
        options = parameters.given(given) if given else ()
        length = asked.headers.get("content-length", "")
        if essence(content_type) == "multipart/form-data":
            told = await self._say_form(request, asked, content_type, options)
        elif length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:  # a file is inside
            async with self._messages.large(asked.credential):
                told = await self._say_body(request, asked, content_type, options, MAX_LARGE_BYTES)
        else:
            told = await self._say_body(request, asked, content_type, options, MAX_BODY_BYTES)
        return _answer(request, told, is_async=asked.is_async)

    async def react(self, request: Request) -> Response:
        """React to a message

        It is kept until it can be sent, as a message is, also while its target is queued.
        """
        return await self._tell(request, shaping.REACTION, self._messages.react)

    async def redact(self, request: Request) -> Response:
        """Remove what a message says

        It is kept until it can be sent, as a message is, also while its target is queued.
        """
        return await self._tell(request, shaping.REDACTION, self._messages.redact)

    async def _say_form(self, request: Request, asked: "_Asked", content_type: str, options: Options) -> Told:
        async with self._messages.form(asked.credential, request.stream(), content_type, options) as (value, files):
            return await self._messages.say(asked.credential, asked.room, value, asked.how(b""), asked.patience, files)

    async def _say_body(
        self, request: Request, asked: "_Asked", content_type: str, options: Options, limit: int
    ) -> Told:
        body = await read_body(request, asked.headers, limit)
        value = await self._messages.read(body, content_type, options)
        how = asked.how(body if len(body) <= MAX_KEPT_BYTES else b"")
        return await self._messages.say(asked.credential, asked.room, value, how, asked.patience)

    async def _tell(self, request: Request, event_type: str, say: Say) -> Response:
        asked = await self._asked(request, event_type)
        body = await read_body(request, asked.headers)
        value = await self._messages.read_object(body)
        told = await say(asked.credential, asked.room, value, asked.how(body), asked.patience)
        return _answer(request, told, is_async=asked.is_async)

    async def _asked(self, request: Request, event_type: str) -> "_Asked":
        request.path_params["eventType"] = event_type  # as in the path of a send: refused calls are logged by it
        headers = headers_of(request)
        credential = await self._callers.credential(headers, request.scope["query_string"])
        self._acceptance.check_share(credential)
        room = identifiers.room_or_user(request.path_params["roomId"])
        patience, is_async = preference(request, headers, "flow", self._wait_seconds)
        key = key_of(request.headers.getlist("idempotency-key")) if "idempotency-key" in headers else None
        return _Asked(headers, credential, room, key, patience or 0.0, patience is not None, is_async)


class _Asked(NamedTuple):
    """What a request says beside its body. `patience`: seconds; `is_async`: it said `respond-async`."""

    headers: Mapping[str, str]
    credential: Credential
    room: str
    key: str | None
    patience: float
    waits: bool
    is_async: bool

    def how(self, body: bytes) -> How:
        return How("flow", self.key, body, self.waits)


def _answer(request: Request, told: Told, *, is_async: bool) -> JsonAnswer:
    request.scope[LOG] = {"user": told.user_id, "delivery": told.delivery}
    return answer_to(told, is_async=is_async)


def answer_to(told: Told, *, is_async: bool) -> JsonAnswer:
    response = _told(told)
    response.add(b"flowbridge-delivery", told.delivery)
    if is_async and response.status_code == 202:
        response.add(b"preference-applied", "respond-async")
    if told.replayed:
        response.add(b"idempotent-replayed", "true")
    return response


def _told(first: Told) -> JsonAnswer:
    """An error only if no event of the message is in the room: a caller that hears one sends it again."""
    if first.event_id is not None and not first.following and not _notes(first):  # most messages
        return _sent(first, [first.event_id])
    events = (first, *first.following)
    if unsettled := [told.status for told in events if told.status]:
        status = "queued" if "queued" in unsettled else unsettled[0]
        accepted = {"delivery_id": first.delivery, "status": status}
        return json_answer(accepted, 202, {"Location": f"/deliveries/{first.delivery}"})
    sent = [told.event_id for told in events if told.event_id is not None]
    if not sent:
        return error_answer(next(told.error for told in events if told.error is not None))
    if remarks := _remarks(events):
        answer = {"event_id": first.event_id, "events": sent, "delivery_id": first.delivery, "flowbridge": remarks}
        return json_answer(answer)
    return _sent(first, sent)


def _sent(first: Told, sent: Sequence[str]) -> JsonAnswer:
    ids = [encode_basestring(event_id) for event_id in sent]  # an encoder of its own would cost 5 µs
    text = f'{{"event_id":{ids[0]},"events":[{",".join(ids)}],"delivery_id":{encode_basestring(first.delivery)}}}'
    return JsonAnswer(text.encode("utf-8", "replace"))


def _notes(told: Told) -> list[str]:
    return [entry["note"] for entry in told.history if "note" in entry]


def _remarks(events: Sequence[Told]) -> Json:
    remarks: Json = {}
    if notes := [note for told in events for note in _notes(told)]:
        remarks["notes"] = notes
    if failed := [(told.delivery, told.error) for told in events if told.error is not None]:
        remarks["failed"] = [
            {"delivery_id": delivery, "errcode": str(error.errcode), "error": error.error} for delivery, error in failed
        ]
    return remarks


async def room_or_user(
    raw: Annotated[
        str,
        segment(
            "roomId",
            "A room id, an alias `#name:server`, or a user id `@name:server`: the direct room with that user, which is "
            "made where there is none. Percent-encoded or raw.",
            ROOM,
        ),
    ],
) -> None: ...


async def options(
    format_: Annotated[
        Literal["text", "markdown", "html", ""],
        query("What a body that is no JSON object is written in.", "markdown", alias="format"),
    ] = "",
    title: Annotated[str, query("As in the message object.", "Backup")] = "",
    msgtype: Annotated[
        Literal["m.text", "m.notice", "m.emote", ""], query("As in the message object.", "m.notice")
    ] = "",
    mentions: Annotated[str, query("As in the message object, with commas between them.", "@al:example.org")] = "",
    reply_to: Annotated[str, query("As in the message object.", "key:build 17")] = "",
    thread: Annotated[str, query("As in the message object.", "key:build 17")] = "",
    edit: Annotated[str, query("As in the message object.", "key:build 17")] = "",
    key: Annotated[str, query("As in the message object.", "build 17")] = "",
    on_update: Annotated[
        Literal["edit", "thread", "reply", "new", ""], query("As in the message object.", "thread")
    ] = "",
    overflow: Annotated[Literal["file", ""], query("As in the message object.", "file")] = "",
) -> None:
    """For the document: `events/message_body.py` reads them."""


_DONE: Json = {"responses": {"200": {"headers": DELIVERY}, "202": ACCEPTED}}
_FORM: Json = {"schema": {"$ref": "#/components/schemas/MessageObject"}}
_SAID: Json = {
    **_DONE,
    "requestBody": {
        "description": "A message object; or a flow message whose `payload` is one, or a text; or a form with its keys "
        "as names; or any other body, which is the text itself. Content-Type is not looked at, but for forms.",
        "content": {
            "text/plain": {"schema": {"type": "string"}, "example": "the backup is done"},
            "application/x-www-form-urlencoded": _FORM,
            "multipart/form-data": _FORM,
        },
    },
}


def routes(core: Core) -> list[Route]:
    messages = Messages(core)

    def route(method: str, path: str, handler: Any, name: str, body: Any, *uses: Any) -> Route:
        return RawRoute(
            method,
            (f"/rooms/{{roomId}}/{path}",),
            handler,
            f"flow_{name}",
            tag=TAGS["flow"],
            uses=[credential, room_or_user, *uses, prefer, idempotency_key],
            answers=Said,
            ok="All its events are in the room.",
            body=body,
            sends=True,
            errors=(*BODY, 422),
            extra=_SAID if body is MessageObject else _DONE,
        )

    return [
        route("POST", "messages", messages.say, "say", MessageObject, options),
        route("PUT", "messages", messages.say, "put_say", MessageObject, options),
        route("POST", "reactions", messages.react, "react", ReactionObject),
        route("POST", "redactions", messages.redact, "redact", RedactionObject),
    ]
