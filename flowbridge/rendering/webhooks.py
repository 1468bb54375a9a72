"""What a request to a hook becomes: its source reads it, a template words it. In the render process; see `child`.

In: the body as text, and what the bridge knows of it. Out: `Made`, as JSON.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from html import unescape
from typing import Any

from flowbridge import sources
from flowbridge.models.hooks import TEMPLATE_FAILED
from flowbridge.rendering import fitting, formats, templates
from flowbridge.rendering.fitting import MAX_TEXT
from flowbridge.rendering.reading import text_of
from flowbridge.rendering.templates import compiled, worded
from flowbridge.sources import generic
from flowbridge.sources.reading import depth_of
from flowbridge.sources.source import Incoming, Nothing, Notice, Source, UnrecognisedError
from flowbridge.sources.summary import summary

MAX_DEPTH = 64
MAX_MESSAGES = 50  # of one request
MAX_ALL = 100_000  # bytes of their texts together: what the render process answers is bounded
MAX_TITLE = 500  # characters, as in a message
MAX_EVENT = 200  # characters of an event's name, and of why there is nothing to say: a request's body may choose them
MAX_MENTIONS = 2_000  # characters
MAX_MEMBER = 256  # characters of what has no text: an id has 255 bytes at most
MAX_KEY = 255  # bytes: as events/relations.py has it

_TEXTS = ("text", "markdown", "html")
_JSON = json.JSONEncoder(ensure_ascii=False)
_SORTED = json.JSONEncoder(sort_keys=True)
Json = dict[str, Any]


def webhook(body: str, given: Mapping[str, Any]) -> tuple[str, None]:
    """What a request to a hook becomes.

    `given`: `source`, `headers`, `per`, `template` (or null), `is_text` (it is no JSON), `may_be_text` (what begins as
    JSON, and is none, is a text), `ignore` (events that are not shown), `plain` (no template is used, since one that
    ends the process is one that fails), `was_ended` (that one is the hook's own).
    """
    try:
        found = _made(_payload(body, given), {**given, "body": body})
    except ValueError as error:
        found = {"wrong": str(error)}
    return _JSON.encode(found), None


def _made(payload: Any, given: Mapping[str, Any]) -> Json:
    headers: Mapping[str, str] = given["headers"]
    source = _source(given["source"], headers, payload)
    made: Json = {"source": source.name, "messages": [], "warnings": [], "delivery_id": "", "event": ""}
    warnings: list[str] = []
    try:
        made["delivery_id"] = _delivery_id(source, headers, payload)
        found = _notices(source, Incoming(payload, headers, given["per"]), warnings)
    except UnrecognisedError as error:
        if source.dialect and given["source"] != sources.AUTO:
            raise
        if source.dialect:  # it was taken for what it is not
            source, made["source"] = generic.SOURCE, generic.SOURCE.name
        else:
            warnings.append(f"{source.title}: {error}; a summary was sent")
        found = [Notice(message={"html": summary(payload)})]
    if isinstance(found, Nothing):
        return {**made, "nothing": _whole(found.reason[: 2 * MAX_EVENT]), "event": _whole(found.event[:MAX_EVENT])}
    found = [_named_briefly(each) for each in found]
    made["event"] = found[0].event if found else ""
    ignore = given.get("ignore", ())
    if shown := [each for each in found if not _is_ignored(each, ignore)]:
        found = shown
    elif found:
        return {**made, "nothing": _unshown(found[0])}
    limit = min(MAX_TEXT, MAX_ALL // max(1, min(len(found), MAX_MESSAGES)))
    made["messages"] = [_said(source, each, payload, given, limit, warnings) for each in found[:MAX_MESSAGES]]
    if len(found) > MAX_MESSAGES:
        warnings.append(f"it holds {len(found)} messages: {MAX_MESSAGES} were made")
    made["warnings"] = [_whole(each[:600]) for each in dict.fromkeys(warnings)][:10]
    return made


def _source(name: str, headers: Mapping[str, str], payload: Any) -> Source:
    try:
        return sources.find(name, headers, payload)
    except Exception:  # a fault of ours must not lose what was sent
        return generic.SOURCE


def _delivery_id(source: Source, headers: Mapping[str, str], payload: Any) -> str:
    try:
        return _whole(source.delivery_id(headers, payload))
    except Exception:  # as above
        return ""


def _notices(source: Source, incoming: Incoming, warnings: list[str]) -> Sequence[Notice] | Nothing:
    try:
        return source.read(incoming)
    except UnrecognisedError:
        raise
    except Exception as error:  # a fault of ours must not lose what was sent
        warnings.append(f"{source.title}: cannot be read: {type(error).__name__}")
        return [Notice(message={"html": summary(incoming.payload)})]


def _named_briefly(notice: Notice) -> Notice:
    event = _whole(notice.event[:MAX_EVENT])
    return notice if event == notice.event else replace(notice, event=event)


def _is_ignored(notice: Notice, ignore: Collection[str]) -> bool:
    """Whether the hook does not show it: the entry that says most about it counts. `+NAME` shows what is quiet else."""
    kind = notice.event.partition(".")[0]
    for name in (f"{notice.event}.{notice.outcome}", notice.event, kind):
        if name in ignore:
            return True
        if f"+{name}" in ignore:
            return False
    return notice.is_quiet


def _unshown(notice: Notice) -> str:
    if notice.is_quiet:
        return f"{notice.event}, which is shown only if the hook's `ignore` has +{notice.event}"
    return f"{notice.event}, which the hook's `ignore` has"


def _said(
    source: Source, notice: Notice, payload: Any, given: Mapping[str, Any], limit: int, warnings: list[str]
) -> Json:
    members: Json = {}
    try:
        if given["plain"]:
            raise formats.RefusedError("takes more than a second, or too much memory")
        members = _members(source, notice, given["template"], _view(source, notice, payload, given["headers"]))
        body, html = _text(members, limit, is_template=bool(given["template"]))
    except Exception as error:  # TemplateError, RefusedError, MemoryError …: what was sent must not be lost by it
        is_by_template = given["template"] or given.get("was_ended") or not _is_said(notice)
        what = TEMPLATE_FAILED if is_by_template else "its text cannot be shown"
        warnings.append(f"{what}, and a summary was sent: {worded(error)}")
        members = {name: value for name, value in members.items() if name not in _TEXTS}
        if given["template"]:  # which can change what it is given: `payload.list.append(1)`
            payload = _payload(given["body"], given)
        body, html = _summary(payload, _titled(source, notice), limit)
    # A template of the hook's own may show what the source does not look at.
    is_own = bool(given["template"]) or notice.same is None
    same = [members.get("title"), body, html] if is_own else notice.same
    return {
        "members": {name: value for name, value in members.items() if name not in _TEXTS},
        "body": _whole(body),
        "html": _whole(html) if html is not None else None,
        "event": notice.event,
        "key": _named(str(members.get("key") or notice.key)),
        "state": notice.state,
        "firing": [_whole(each) for each in notice.firing],
        "ended": None if notice.ended is None else [_whole(each) for each in notice.ended],
        "time": notice.time,
        "digest": hashlib.sha256(_SORTED.encode(same).encode()).hexdigest()[:32],
    }


def _view(source: Source, notice: Notice, payload: Any, headers: Mapping[str, str]) -> Json:
    return {
        **notice.view,
        "payload": payload,
        "headers": dict(headers),
        "source": source.name,
        "event": notice.event,
        "key": notice.key,
        "state": notice.state,
    }


def _members(source: Source, notice: Notice, template: Mapping[str, str] | None, view: Json) -> Json:
    if template:
        return _bounded(compiled(tuple(template.items())).render(view))
    members = _bounded(notice.message or {})
    if _is_said(notice):
        return members
    if isinstance(source.template, str):
        return {**members, **compiled((("html", source.template),)).render(view)}
    html = source.template(view, templates.as_html).strip()
    return {**members, "html": html} if html else members


def _is_said(notice: Notice) -> bool:
    """Whether it is a message already."""
    return any(name in (notice.message or {}) for name in (*_TEXTS, "attachments"))


def _bounded(members: Mapping[str, Any]) -> Json:
    """A title is one line; the others are short. What they are to be in the message is checked where it is made."""
    found = {}
    for name, value in members.items():
        if not isinstance(value, str) or name in _TEXTS:
            found[name] = value
        elif name == "title":
            found[name] = _whole(" ".join(value[: 4 * MAX_TITLE].split())[:MAX_TITLE])
        elif name == "mentions" and value.lstrip().startswith("["):
            found[name] = _listed(value[:MAX_MENTIONS])
        else:
            found[name] = _whole(value.strip()[: MAX_MENTIONS if name in ("mentions", "key") else MAX_MEMBER])
    return found


def _listed(mentions: str) -> Any:
    try:
        return json.loads(mentions)
    except ValueError:
        return mentions


def _text(members: Mapping[str, Any], limit: int, *, is_template: bool) -> tuple[str, str | None]:
    """Body and HTML, cut to what fits. Raises ValueError."""
    if (html := members.get("html")) is not None:
        body, found = fitting.html(_whole(str(html)), limit)
        return body, found if found and ("<" in found or unescape(found) != body) else None
    if (markdown := members.get("markdown")) is not None:
        body, found = fitting.markdown(_whole(str(markdown)), limit)
        # In a template's Markdown the payload's own marks are escaped, which none should read.
        return (text_of(found) or body, found) if found and is_template else (body, found)
    text = members.get("text")
    if text is None and not members.get("attachments"):
        raise formats.RefusedError("it makes none of text, markdown and html")
    return fitting.text(_whole(str(text or "")), limit), None


def _summary(payload: Any, title: str, limit: int) -> tuple[str, str | None]:
    try:
        return fitting.html(_whole(summary(payload, title)), limit)
    except ValueError:  # all that it holds are spaces
        return title or "A request that holds no text.", None


def _titled(source: Source, notice: Notice) -> str:
    name = "" if source is generic.SOURCE else source.title
    return ": ".join(filter(None, (name, notice.event)))


def _named(key: str) -> str:
    """A key that a store takes: Alertmanager's hold all matchers of a route, and can be as long as these."""
    if len(key.encode("utf-8", "replace")) <= MAX_KEY and key.isprintable():
        return _whole(key)
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def _whole(text: str) -> str:
    """Without what no event may hold: lone surrogates, and zeros."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _payload(body: str, given: Mapping[str, Any]) -> Any:
    if given["is_text"]:
        return body
    try:
        return _parsed(body)
    except ValueError:
        if not given.get("may_be_text", False):
            raise
        return body


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
    if depth_of(found, MAX_DEPTH) > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    return found
