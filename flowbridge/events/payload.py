"""The shapes a body may have, read into one Payload (contract §1, "What a body may be").

1. the event's content                                {"msgtype": "m.text", "body": "hi"}
2. a flow message (flow surface)                      {"payload": …, "topic": …, "_msgid": …}
3. a whole event, as the seed documents print it      {"type": …, "content": {…}, "state_key": …, …}
4. a text, for m.room.message (flow surface)          "hi", or any body that is neither JSON nor a form
"""

import codecs
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from email.message import Message
from itertools import islice
from typing import Any

from flowbridge.errors import BadContent, NotJson, Problem, UnsupportedMedia
from flowbridge.events import canonical_json
from flowbridge.models import Payload, Surface

Required = Callable[[str], AbstractSet[str]]

RULE = "body"  # what Problem.schema says for these rules
MESSAGE = "m.room.message"
REDACTION = "m.room.redaction"
MAX_IGNORED = 20  # names of ignored keys that an answer repeats

_FLOW_KEYS = frozenset({"payload", "topic", "_msgid"})
_EVENT_KEYS = frozenset({"type", "content", "state_key", "redacts", "membership"})  # the last as api/v1 prints it
# Keys that belong inside a content or a message. Beside `payload` or `content` they have no effect: the answer names
# them. Not those that Node-RED's own nodes set (url, filename, title, …), which any flow message may carry.
_CONTENT_KEYS = frozenset(
    {
        "msgtype",
        "body",
        "format",
        "formatted_body",
        "state_key",
        "text",
        "markdown",
        "html",
        "mentions",
        "reply_to",
        "thread",
        "edit",
        "attachments",
    }
)
_TEXT_CODECS = frozenset({"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin1", "windows-1252"})
_NEVER_JSON = ("multipart/", "application/xml", "text/xml")
_BEGINNINGS = (b"{", b"[", b'"')  # of JSON: what breaks off behind one of these is not meant as a text
_BOM = "\ufeff"  # an editor's mark, not a part of the text


def read(body: bytes, content_type: str, event_type: str, required: Required, surface: Surface) -> Payload:
    """Read a request body. `required`: the keys that the content of an event type must have.

    Content-Type hardly counts: curl labels everything as a form, and many flow tools label nothing. text/plain says
    that what looks like broken JSON is a text.
    Raises NotJson, BadContent, or UnsupportedMedia for a form, multipart or XML body.
    """
    if not body.strip():
        raise NotJson("the body is empty: send the event's content as a JSON object")
    flow = surface == "flow"
    is_message = flow and event_type == MESSAGE
    is_plain = content_type[:10].lower() == "text/plain"
    try:
        document = canonical_json.read(body)
    except (NotJson, BadContent):
        begins_as_json = body.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in _BEGINNINGS
        if is_message and is_plain:
            return _text_message(body, content_type)
        if not begins_as_json:
            _refuse_forms(content_type, body)
            if is_message:
                return _text_message(body, content_type)
        raise
    value = document.value
    if is_message and not isinstance(value, dict) and (is_plain or not isinstance(value, str | list | None)):
        return _text_message(body, content_type)
    payload = _unwrap(value, event_type, required, flow)
    if not document.clean and (found := canonical_json.problems(payload.content)):
        raise BadContent(found)
    return payload


def _unwrap(value: Any, event_type: str, required: Required, flow: bool) -> Payload:
    if isinstance(value, dict) and "payload" not in value and "content" not in value:
        return Payload(value)  # most bodies
    keys = required(event_type)
    ignored: tuple[str, ...] = ()
    if flow and _is_flow_message(value, keys):
        _check_envelope(value)
        ignored = _ignored(value, keys, _FLOW_KEYS)
        value = value["payload"]
        if not isinstance(value, dict | str):
            _refuse("/payload", "must be the event's content (an object) or a string")
    if _is_whole_event(value, event_type, keys):
        _check_envelope(value)
        return _from_event(value, event_type, (*ignored, *_ignored(value, keys, _EVENT_KEYS)))
    if isinstance(value, str) and flow and event_type == MESSAGE:
        return Payload(_message(value), ignored=ignored)
    if not isinstance(value, dict):
        _refuse("", f"must be a JSON object: the content of {event_type}")
    if isinstance(value.get("content"), dict) and "type" not in value and keys and keys.isdisjoint(value):
        _refuse(
            "/content",
            f"is the content of {event_type}, one level too deep: send it by itself, or as a whole event with "
            f'"type": "{event_type}" beside it',
        )
    return Payload(value, ignored=ignored)


def _is_flow_message(value: Any, required: AbstractSet[str]) -> bool:
    """Whether this is a body with `payload` that is not clearly the content itself, with all that it requires.

    Node-RED's own keys prove nothing: a flow message for m.room.topic has a `topic`, too, and it is another one.
    """
    if not isinstance(value, dict) or "payload" not in value or "payload" in required:
        return False
    proof = required - _FLOW_KEYS
    return not (proof and proof <= value.keys()) if required else _FLOW_KEYS.issuperset(value)


def _ignored(envelope: dict[str, Any], required: AbstractSet[str], own: AbstractSet[str]) -> tuple[str, ...]:
    """The keys beside `payload` or `content` that look like a part of it, and are not the envelope's own."""
    looked_for = (_CONTENT_KEYS | required) - own
    found = (key[:255] for key in envelope if key in looked_for or key.startswith("m."))
    return tuple(islice(found, MAX_IGNORED))


def _is_whole_event(value: Any, event_type: str, required: AbstractSet[str]) -> bool:
    """A body with `type` and `content`, unless it names another type and has all keys that a content requires."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), dict):
        return False
    named = value.get("type")
    return named == event_type or (isinstance(named, str) and not (required and required <= value.keys()))


def _from_event(event: dict[str, Any], event_type: str, ignored: tuple[str, ...]) -> Payload:
    if event["type"] != event_type:
        _refuse("/type", f"is {event['type'][:255]!r} but the path says {event_type!r}")
    state_key = event.get("state_key")
    if state_key is not None and not isinstance(state_key, str):
        _refuse("/state_key", "must be a string")
    content = event["content"]
    if event_type == REDACTION and "redacts" in event:  # its place before room version 11
        content = {"redacts": event["redacts"], **content}
    return Payload(content, state_key, ignored)


def _check_envelope(value: dict[str, Any]) -> None:
    if repeated := canonical_json.duplicates(value):
        raise BadContent(repeated)


def _message(text: str) -> dict[str, str]:
    return {"msgtype": "m.text", "body": text}


def _text_message(body: bytes, content_type: str) -> Payload:
    return Payload(_message(_text(body, content_type)))


def _refuse(pointer: str, message: str) -> None:
    raise BadContent([Problem(pointer, message, RULE)])


def _text(body: bytes, content_type: str) -> str:
    header = Message()
    header["content-type"] = content_type
    charset = str(header.get_param("charset", "utf-8")).lower()
    if charset not in _TEXT_CODECS:
        raise UnsupportedMedia(f"the charset {charset[:40]!r} is not supported: send UTF-8")
    try:
        return body.decode(charset).removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise NotJson(f"the text is not {charset}: byte {error.start} is wrong") from None


def _refuse_forms(content_type: str, body: bytes) -> None:
    media_type = content_type.lower()
    is_form = media_type.startswith("application/x-www-form-urlencoded") and b"=" in body
    if is_form or media_type.startswith(_NEVER_JSON) or "+xml" in media_type:
        raise UnsupportedMedia(
            f"the body is {media_type.split(';')[0][:80]}, not JSON: send the event's content as a JSON object"
        )
