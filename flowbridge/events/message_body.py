"""The bodies in which a message may come, read into a message object (contract §5). Pure.

A body that is no JSON object is the text itself, whatever its Content-Type: `curl -d 'backup done'` calls it a form.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from flowbridge.errors import BadContent, BadRequest, NotJson, Problem
from flowbridge.events import canonical_json
from flowbridge.events.message import FORMATS, KEYS, RULE
from flowbridge.events.payload import decoded

FIELDS = tuple(name for name in KEYS if name != "attachments")  # what a form may hold
OPTIONS = ("format", *(name for name in FIELDS if name not in FORMATS))  # what a query may hold
MAX_FIELDS = 50

_FORM = "application/x-www-form-urlencoded"
_EMPTY = 'the body is empty: send the text, or a JSON object like {"text": "hello"}'


def read(body: bytes, content_type: str, given: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The message object. `given`: in the query. Raises NotJson, BadContent or BadRequest."""
    return _with(_value(body, content_type), given)


def read_form(fields: Sequence[tuple[str, str]], given: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The message object of a form that has been taken apart. Raises BadContent or BadRequest."""
    problems = [
        Problem(canonical_json.pointer("", name[:255]), f"is unknown here: known are {', '.join(FIELDS)}", RULE)
        for name, _ in fields
        if name not in FIELDS
    ]
    if problems:
        raise BadContent(problems)
    return _with(_fields(fields), given)


def _with(value: Any, given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A message, and what the query says of it."""
    if not given and isinstance(value, dict):
        return value
    options = _fields(given)
    format_ = options.pop("format", None)
    if format_ is not None and format_ not in FORMATS:
        raise BadRequest(f"format: must be text, markdown or html, not {format_[:80]!r}")
    if isinstance(value, str):
        return {format_ or "text": value, **options}
    problems = [Problem(f"/{name}", "is given in the query, too", RULE) for name in options if name in value]
    if problems:
        raise BadContent(problems)
    if format_ is not None:
        raise BadRequest("format: it is for a body that is a text. Name the text `markdown` or `html` in the object")
    return {**value, **options}


def read_object(body: bytes) -> dict[str, Any]:
    """A body that has to be a JSON object, or a flow message with one. Raises NotJson or BadContent."""
    if not body.strip():
        raise NotJson("the body is empty: send a JSON object")
    value = _checked(canonical_json.read(body))
    if not isinstance(value, dict):
        raise BadContent([Problem("", "must be a JSON object", RULE)])
    return value


def _value(body: bytes, content_type: str) -> Any:
    """A message object, or a text."""
    if not body.strip():
        raise NotJson(_EMPTY)
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == _FORM and (form := _from_form(body)) is not None:
        return form
    begins = body.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins == b"{":
        try:
            return _checked(canonical_json.read(body))
        except NotJson:
            if media_type != "text/plain":
                raise
    elif begins == b'"' and media_type != "text/plain":
        try:
            text = json.loads(body)
        except ValueError:  # a text that begins with a quotation
            text = None
        if isinstance(text, str):
            return text
    return decoded(body, content_type).rstrip("\r\n")  # a shell ends each output with one


def _checked(document: canonical_json.Document) -> Any:
    """The message, without what may stand beside it in a flow message."""
    value = document.value
    if isinstance(value, dict) and "payload" in value:
        if repeated := canonical_json.duplicates(value):
            raise BadContent(repeated)
        value = value["payload"]
        if not isinstance(value, dict | str):
            raise BadContent([Problem("/payload", "must be the text, or a message object", RULE)])
    if not document.clean and (problems := canonical_json.problems(value)):
        raise BadContent(problems)
    return value


def _from_form(body: bytes) -> dict[str, Any] | None:
    """The fields of a form; None where it is a text: a name is unknown, or there is none."""
    if b"=" not in body:
        return None
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError:
        return None
    return _fields(pairs) if all(name in FIELDS for name, _ in pairs) else None


def _fields(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Blank fields are absent, as a browser sends them, except for the text."""
    found: dict[str, Any] = {}
    problems = []
    for name, value in pairs:
        if name == "mentions" and name in found:
            found[name] = f"{found[name]},{value}"
        elif name in found:
            problems.append(Problem(f"/{name}", "is there twice", RULE))
        elif value or name in FORMATS:
            found[name] = value
    if problems:
        raise BadContent(problems)
    return found
