"""What a request to a hook becomes: its source reads it, a template words it. In the render process; see `child`.

In: the body as text, and what the bridge knows of it. Out: `Made`, as JSON.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowbridge import sources
from flowbridge.rendering import formats
from flowbridge.rendering.templates import TemplateError, compiled
from flowbridge.sources import generic
from flowbridge.sources.source import Incoming, Nothing, Notice, Source, UnrecognisedError
from flowbridge.sources.summary import summary

MAX_DEPTH = 64
MAX_MESSAGES = 50  # of one request
MAX_TEXT = 24_000  # bytes of body and HTML: an event holds 62,000, and an edit holds its text twice

_TEXTS = ("text", "markdown", "html")
_ITEM = re.compile(r"<li>(?:(?!</?li>).)*</li>\s*", re.DOTALL)
Json = dict[str, Any]


def webhook(body: str, given: Mapping[str, Any]) -> tuple[str, None]:
    """`given`: `source`, `headers`, `per`, `template` (or null), `is_text` (it is no JSON), `plain` (no template)."""
    try:
        payload = body if given["is_text"] else _parsed(body)
        found = _made(payload, given)
    except ValueError as error:
        found = {"wrong": str(error)}
    return json.dumps(found), None


def _made(payload: Any, given: Mapping[str, Any]) -> Json:
    headers: Mapping[str, str] = given["headers"]
    source = sources.find(given["source"], headers, payload)
    made: Json = {"source": source.name, "messages": [], "warnings": [], "delivery_id": ""}
    try:
        made["delivery_id"] = source.delivery_id(headers, payload)
        found = _notices(source, Incoming(payload, headers, given["per"]), made["warnings"])
    except UnrecognisedError as error:
        if source.dialect:
            raise
        made["warnings"].append(f"{source.title}: {error}")
        found = [Notice(message={"html": summary(payload)})]
    if isinstance(found, Nothing):
        return {**made, "nothing": found.reason, "event": found.event}
    made["event"] = found[0].event if found else ""
    made["messages"] = [_said(source, each, payload, given, made["warnings"]) for each in found[:MAX_MESSAGES]]
    if len(found) > MAX_MESSAGES:
        made["warnings"].append(f"it holds {len(found)} messages: {MAX_MESSAGES} were made")
    return made


def _notices(source: Source, incoming: Incoming, warnings: list[str]) -> Sequence[Notice] | Nothing:
    try:
        return source.read(incoming)
    except UnrecognisedError:
        raise
    except Exception as error:  # a fault of ours must not lose what was sent
        warnings.append(f"{source.title}: cannot be read: {type(error).__name__}")
        return [Notice(message={"html": summary(incoming.payload)})]


def _said(source: Source, notice: Notice, payload: Any, given: Mapping[str, Any], warnings: list[str]) -> Json:
    view = {
        **notice.view,
        "payload": payload,
        "headers": given["headers"],
        "source": source.name,
        "event": notice.event,
        "key": notice.key,
        "state": notice.state,
    }
    members: Json = {}
    body, html = "", None
    try:
        if given["plain"]:
            raise formats.RefusedError("its template takes more than a second")  # it was ended
        members = _members(source, notice, given["template"], view)
        body, html = _text(members)
    except (TemplateError, ValueError, RecursionError) as error:
        warnings.append(f"the template failed, and a summary was sent: {str(error)[:500]}")
        members = {name: value for name, value in members.items() if name not in _TEXTS}
        body, html = formats.html(summary(payload, _titled(source, notice)), ())
    same = notice.same if notice.same is not None else body
    return {
        "members": {name: value for name, value in members.items() if name not in _TEXTS},
        "body": _whole(body),
        "html": _whole(html) if html is not None else None,
        "event": notice.event,
        "key": str(members.get("key") or notice.key),
        "state": notice.state,
        "firing": list(notice.firing),
        "time": notice.time,
        "digest": hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:32],
    }


def _members(source: Source, notice: Notice, template: Mapping[str, str] | None, view: Json) -> Json:
    if template:
        return dict(compiled(tuple(template.items())).render(view))
    if notice.message is not None:
        return dict(notice.message)
    return dict(compiled((("html", source.template),)).render(view))


def _text(members: Mapping[str, Any]) -> tuple[str, str | None]:
    """Body and HTML, cut to what fits. Raises ValueError."""
    if (html := members.get("html")) is not None:
        return _fitting_html(str(html))
    if (markdown := members.get("markdown")) is not None:
        return formats.markdown(_cut(str(markdown)), ())
    text = members.get("text")
    if text is None and not members.get("attachments"):
        raise formats.RefusedError("makes none of text, markdown and html")
    return _cut(str(text or "")), None


def _fitting_html(html: str) -> tuple[str, str | None]:
    """Items of lists are dropped from the end, then the text is cut."""
    body, found = formats.html(html, ())
    if found is None or _size(body, found) <= MAX_TEXT:
        return body, found
    items = list(_ITEM.finditer(found))
    low, high = 0, len(items)  # how many of them stay
    while low < high:
        middle = (low + high + 1) // 2
        if _size(*formats.html(_without(found, items[middle:]), ())) <= MAX_TEXT:
            low = middle
        else:
            high = middle - 1
    if items and low:
        return formats.html(_without(found, items[low:]), ())
    return _cut(body), None


def _without(html: str, items: Sequence[re.Match[str]]) -> str:
    if not items:
        return html
    kept, at = [], 0
    for number, item in enumerate(items):
        kept.append(html[at : item.start()])
        if number == 0:
            kept.append(f"<li>… and {len(items)} more</li>")
        at = item.end()
    return "".join([*kept, html[at:]])


def _cut(text: str) -> str:
    if _size(text, "") <= MAX_TEXT:
        return text
    start = text.encode("utf-8", "replace")[: MAX_TEXT - 100].decode("utf-8", "ignore")
    return f"{start}… (cut here)"


def _size(body: str, html: str | None) -> int:
    return len(body.encode("utf-8", "replace")) + len((html or "").encode("utf-8", "replace"))


def _titled(source: Source, notice: Notice) -> str:
    name = "" if source is generic.SOURCE else source.title
    return ": ".join(filter(None, (name, notice.event)))


def _whole(text: str) -> str:
    """Without what no event may hold: lone surrogates, and zeros."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _parsed(body: str) -> Any:
    """Floats and duplicate keys are the senders' affair. Raises ValueError, as a sentence."""
    try:
        found = json.loads(body)
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        where = f" at line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        what = error.msg if isinstance(error, json.JSONDecodeError) else "a number is too long"
        raise ValueError(f"is not valid JSON: {what}{where}") from None
    _check_depth(found)
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
