"""A file's name and type, and the JSON shapes that can hold a file. Pure.

A JSON body holds a file when it is exactly one of these shapes. An object with nothing but a `url` is refused: it would
be uploaded as JSON, which its sender does not mean. Any other JSON is a file itself:

    {"data": "<base64>"}                 with or without `filename` and `content_type`, and no other key
    {"data": "data:image/png;base64,…"}  likewise
    "data:image/png;base64,…"            a JSON string
    {"type": "Buffer", "data": [137, …]} a Node-RED Buffer, and no other key
    {"payload": <one of these>, …}       a flow message, with or without `filename` and `contentType`

`contentType` and `content_type` mean the same everywhere. A body of one of these shapes with a fault in it (a number
that is not a byte, wrong base64) is refused.
"""

import base64
import codecs
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from flowbridge.errors import BadContent, BadRequest, Problem
from flowbridge.homeserver import identifiers, large_json

UNKNOWN = "application/octet-stream"
JSON = "application/json"

_TYPES = mimetypes.MimeTypes()  # Python's own list: the machine's would make answers differ
_MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+(?:\s*;[\t\x20-\x7e]*)?", re.ASCII)
_URL = re.compile(rb'\s*"data:', re.IGNORECASE)
_OBJECT = re.compile(rb"\s*\{")
_ARRAY = re.compile(rb'"data"\s*:\s*\[')  # cannot stand inside a JSON string: the quotes would be escaped
_DIGITS = re.compile(rb"[\d,\s]*")
_SLICE = 64 * 1024  # bytes of JSON numbers at a time, so that other threads can run
_TYPE_KEYS = ("content_type", "contentType")
_BASE64_KEYS = frozenset({"data", "filename", *_TYPE_KEYS})
_LINK_KEYS = frozenset({"url", "filename", *_TYPE_KEYS})
_HINTS = (b'"data"', b'"payload"', b'"url"')


@dataclass(frozen=True, slots=True)
class Label:
    """A file's name and type; both may be empty."""

    filename: str = ""
    content_type: str = ""

    def or_else(self, other: "Label") -> "Label":
        """This label, with the other's values where it has none."""
        return Label(self.filename or other.filename, self.content_type or other.content_type)

    @property
    def media_type(self) -> str:
        """The type, guessed from the name when it is not given."""
        return self.content_type or _guess(self.filename)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file out of a JSON body."""

    data: bytes
    label: Label


def filename(text: str, what: str = "filename") -> str:
    """A file's name without folders; empty when nothing is left. Raises BadRequest."""
    name = re.split(r"[/\\]", text)[-1].strip()
    return "" if name in (".", "..") else identifiers.identifier(name, what, empty=True)


def content_type(text: str, what: str = "Content-Type") -> str:
    """A media type with its parameters, or nothing. Raises BadRequest for anything else."""
    text = text.strip()
    if text and (len(text) > identifiers.MAX_BYTES or not _MEDIA_TYPE.fullmatch(text)):
        raise BadRequest(f"{what}: not a media type; one has the form image/png")
    return text


def essence(text: str) -> str:
    """A media type without its parameters, in lower case."""
    return text.partition(";")[0].strip().lower()


def read(body: bytes) -> Attachment | None:
    """The file that a JSON body holds; None when it is a file itself. Raises BadRequest. May take some seconds."""
    body = body.removeprefix(codecs.BOM_UTF8)
    if not _may_hold_one(body):
        return None
    begin = _ARRAY.search(body)
    end = body.find(b"]", begin.end()) if begin else -1
    numbers = b""
    if begin and end >= 0:
        numbers, body = body[begin.end() : end], body[: begin.end()] + body[end:]
    try:
        value = large_json.read(body, levels=1)
    except (ValueError, RecursionError):
        return None
    return _found(value, numbers, "")


def decode(value: Any, at: str) -> Attachment:
    """A file inside a message that has been read already: base64, a `data:` URL or a Node-RED Buffer.

    Raises BadContent. May take some seconds.
    """
    if isinstance(value, str):
        return _data_url(value, at) if value[:5].lower() == "data:" else Attachment(_base64(value, at), Label())
    if isinstance(value, dict) and value.get("type") == "Buffer" and isinstance(value.get("data"), list):
        numbers = value["data"]
        try:
            return Attachment(bytes(numbers), Label())
        except (TypeError, ValueError):
            first = next(index for index, each in enumerate(numbers) if type(each) is not int or not 0 <= each < 256)
            raise _wrong(f"{at}/data/{first}", "must be an integer from 0 to 255") from None
    raise _wrong(at, "must be base64, a data: URL, or a Node-RED Buffer")


def _may_hold_one(body: bytes) -> bool:
    """Whether the body is worth parsing: JSON that is a file itself may be long."""
    return bool(_URL.match(body) or (_OBJECT.match(body) and any(key in body for key in _HINTS)))


def _found(value: Any, numbers: bytes, at: str) -> Attachment | None:
    """`numbers`: the text of the first array named `data`, which is empty in the value."""
    if isinstance(value, str) and value[:5].lower() == "data:":
        return _data_url(value, at)
    if not isinstance(value, dict):
        return None
    data = value.get("data")
    if value.keys() == {"type", "data"} and value["type"] == "Buffer" and data == []:
        return Attachment(_bytes(numbers, f"{at}/data"), Label())
    if isinstance(data, str) and value.keys() <= _BASE64_KEYS:
        is_url = data[:5].lower() == "data:"
        found = _data_url(data, f"{at}/data") if is_url else Attachment(_base64(data, f"{at}/data"), Label())
        return replace(found, label=_label(value, at).or_else(found.label))
    if "url" in value and value.keys() <= _LINK_KEYS:
        raise _wrong(f"{at}/url", "is not fetched: send the file itself, as bytes or base64 under `data`")
    if "payload" in value and not at and (inner := _found(value["payload"], numbers, "/payload")):
        return replace(inner, label=_label(value, at).or_else(inner.label))
    return None


def _label(value: Mapping[str, Any], at: str) -> Label:
    texts = {}
    for key in ("filename", *_TYPE_KEYS):
        text = value.get(key)
        if text is not None and not isinstance(text, str):
            raise _wrong(f"{at}/{key}", "must be a string")
        texts[key] = text or ""
    type_ = texts["content_type"] or texts["contentType"]
    return Label(filename(texts["filename"]), content_type(type_, "content_type"))


def _data_url(text: str, at: str) -> Attachment:
    """RFC 2397."""
    head, comma, data = text[5:].partition(",")
    if not comma:
        raise _wrong(at, "is a data: URL without a comma")
    type_, is_base64 = (head[:-7], True) if head.lower().endswith(";base64") else (head, False)
    if not type_.partition(";")[0]:
        type_ = f"text/plain{type_ or ';charset=US-ASCII'}"
    raw = unquote_to_bytes(data.encode("utf-8", "replace"))
    return Attachment(
        _base64(raw.decode("latin-1"), at) if is_base64 else raw, Label("", content_type(type_, "data URL"))
    )


def _base64(text: str, at: str) -> bytes:
    """Either alphabet of RFC 4648, with or without padding and line breaks."""
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"})
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise _wrong(at, "is not base64") from None


def _bytes(numbers: bytes, at: str) -> bytes:
    if not numbers.strip():
        return b""
    found = bytearray()
    start = 0
    while start <= len(numbers):
        end = numbers.find(b",", start + _SLICE)
        part = numbers[start:] if end < 0 else numbers[start:end]
        start = len(numbers) + 1 if end < 0 else end + 1
        try:
            if not _DIGITS.fullmatch(part):
                raise ValueError
            found += bytes(map(int, part.split(b",")))
        except ValueError:
            raise _wrong(f"{at}/{len(found) + _first_wrong(part)}", "must be an integer from 0 to 255") from None
    return bytes(found)


def _first_wrong(part: bytes) -> int:
    items = part.split(b",")
    right = (item.strip().isdigit() and len(item.strip()) < 4 and int(item) < 256 for item in items)
    return next((index for index, is_right in enumerate(right) if not is_right), 0)


def _guess(name: str) -> str:
    type_, encoding = _TYPES.guess_type(name, strict=False)
    return type_ if type_ and not encoding else UNKNOWN


def _wrong(pointer: str, message: str) -> BadContent:
    return BadContent([Problem(pointer, message, "media")])
