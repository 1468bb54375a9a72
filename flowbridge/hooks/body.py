"""The body of a request to a hook, as the text that its source reads: out of a form, a multipart part, gzip. Pure."""

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote_to_bytes

from flowbridge.errors import BadRequest, TooLarge, UnsupportedMedia
from flowbridge.services.media.attachment import essence
from flowbridge.services.media.multipart import Parts, Sink, field_name

Headers = Mapping[str, str]
Form = Literal["json", "text", "either"]  # of a text; "either": what does not parse as JSON is a text

MAX_FIELDS = 200
PIECE_BYTES = 16 * 1024
MAX_MEMBERS = 16  # of a gzip body: senders make one, and 50,000 tiny ones would take minutes
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"

_PAYLOADS = ("payload", "data", "payload_json")  # fields that hold JSON: GitHub's and Slack's, Uptime Kuma's, Discord's
_BEGINNINGS = ("{", "[", '"')  # of JSON: `42` is the text 42
_EMPTY = "the body is empty: there is nothing to say"
_FIELD = re.compile(r"[\w.\-\[\]:%+]{1,100}=[^\s]*", re.ASCII)  # of a form as programs write it: curl's -d is a text
_BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class Body:
    text: str
    form: Form


def read(raw: bytes, headers: Headers, limit: int) -> Body:
    """Raises BadRequest, TooLarge and UnsupportedMedia: for a body that can never be taken."""
    raw = _unpacked(raw, headers, limit)
    content_type = headers.get("content-type", "")
    kind = essence(content_type)
    if not raw or raw.isspace():
        raise BadRequest(_EMPTY)
    if kind in ("application/xml", "text/xml") or kind.endswith("+xml") or raw[:100].lstrip()[:5].lower() == b"<?xml":
        raise UnsupportedMedia("XML is not read here: send JSON, a form with a field `payload`, or a text")
    if kind == MULTIPART:
        return _of_fields(_multipart(raw, content_type))
    text = _decoded(raw)
    start = text.lstrip()[:1]
    if start in _BEGINNINGS:
        # `curl -d` labels all it sends a form: `[ERROR] disk full` is a text, `{` begins JSON that broke off.
        may_be_text = kind == "text/plain" or (kind == FORM and start != "{")
        return Body(text, "either" if may_be_text else "json")
    text = text.strip()
    if not text:  # more is a space in Unicode than in ASCII
        raise BadRequest(_EMPTY)
    if kind == FORM and text.count("&") < MAX_FIELDS and all(map(_FIELD.fullmatch, text.split("&"))):
        return _of_fields([(_unquoted(name), _unquoted(value)) for name, value in map(_split, text.split("&"))])
    return Body(text, "text")


def is_compressed(headers: Headers) -> bool:
    return headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip")


def is_larger(raw: bytes, headers: Headers, bound: int) -> bool:
    """Whether it holds more than this when it is unpacked; False for what cannot be."""
    try:
        _unpacked(raw, headers, bound)
    except TooLarge:
        return True
    except (BadRequest, UnsupportedMedia):
        return False
    return False


def _unpacked(raw: bytes, headers: Headers, limit: int) -> bytes:
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return raw
    if not is_compressed(headers):
        raise UnsupportedMedia(f"Content-Encoding {encoding[:40]!r} is not read: send gzip, or the body as it is")
    found, rest = bytearray(), raw
    for _ in range(MAX_MEMBERS):
        if not rest:
            break
        unpacker = zlib.decompressobj(wbits=31)
        try:
            found += unpacker.decompress(rest, limit + 1 - len(found))
        except zlib.error:
            raise BadRequest("the body is not gzip, as Content-Encoding says") from None
        if len(found) > limit:
            raise TooLarge(f"the body is longer than {limit} bytes when it is unpacked")
        if not unpacker.eof:
            raise BadRequest("the body is gzip that breaks off")
        rest = unpacker.unused_data.lstrip(b"\0")
    if rest:
        raise BadRequest(f"the body is gzip of more than {MAX_MEMBERS} members")
    return bytes(found)


def _multipart(raw: bytes, content_type: str) -> list[tuple[str, str]]:
    fields: list[tuple[str, bytearray]] = []

    def begin(headers: dict[str, str]) -> Sink | None:
        if len(fields) >= MAX_FIELDS:
            raise BadRequest(f"the form holds more than {MAX_FIELDS} parts")
        if "filename" in headers.get("content-disposition", "") and field_name(headers) not in _PAYLOADS:
            return None  # a file: messages have attachments by URL
        fields.append((field_name(headers), bytearray()))
        return fields[-1][1].extend

    parts = Parts(content_type, begin)
    parts.feed(raw)
    parts.end()
    return [(name, _decoded(bytes(value))) for name, value in fields]


def _of_fields(fields: list[tuple[str, str]]) -> Body:
    """The field that holds JSON, else all fields as an object."""
    values = dict(fields)
    for name in _PAYLOADS:
        if (value := values.get(name, "").strip()) and value[:1] in _BEGINNINGS:
            return Body(value, "json")
    if not any(value.strip() for value in values.values()):
        raise BadRequest("the form is empty: there is nothing to say")
    if len(values) == 1 and (value := values.get("payload", "")):
        return Body(value, "text")
    return Body(json.dumps(values), "json")


def _split(field: str) -> tuple[str, str]:
    name, _, value = field.partition("=")
    return name, value


def _unquoted(text: str) -> str:
    """Piece by piece: of a whole megabyte of escapes urllib makes 80 MB of pieces, and takes 50 ms in one go."""
    raw = text.replace("+", " ").encode("utf-8", "replace")
    found, at = bytearray(), 0
    while at < len(raw):
        end = at + PIECE_BYTES
        if (escape := raw.rfind(b"%", end - 2, end)) >= 0:  # which goes on in the next piece
            end = escape
        found += unquote_to_bytes(raw[at:end])
        at = end
    return found.decode("utf-8", "replace")


def _decoded(raw: bytes) -> str:
    """What is no UTF-8 is replaced: one wrong byte must not lose a message."""
    return raw.decode("utf-8", "replace").removeprefix(_BOM)
