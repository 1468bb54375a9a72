"""Anything that can POST: the keys of a message (contract §5), else a readable summary of any JSON.

Two other bridges' bodies are read, too: matrix-hookshot's `text`, `html` and `username`, and
matrix-appservice-webhooks' `text`, `format`, `displayName`, `msgtype` and `emoji`; and Slack's, wherever it arrives.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flowbridge.sources import slack
from flowbridge.sources.emoji import with_emoji
from flowbridge.sources.reading import mapping, objects, text
from flowbridge.sources.source import Headers, Incoming, Nothing, Notice, Source
from flowbridge.sources.summary import summary

MAX_NAME = 100  # characters

_TEXTS = ("text", "markdown", "html")
KEYS = (  # of a message, as events/message.py has them: a test holds them equal
    *_TEXTS,
    *("title", "msgtype", "mentions", "reply_to", "thread", "edit", "key", "on_update", "attachments", "overflow"),
)
_MSGTYPES = {"notice": "m.notice", "emote": "m.emote", "m.text": "m.text", "m.notice": "m.notice", "m.emote": "m.emote"}
_ON_UPDATE = ("edit", "thread", "reply", "new")
_FILES = ("url", "data", "content_uri")
_MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&=])")
_BLOCK = re.compile(r"\s*(?:[#>|`-]|[*+] |\d+[.)] )")


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if isinstance(payload, dict):
        if not any(name in payload for name in (*_TEXTS, "attachments")) and "payload" in payload:
            payload = payload["payload"]  # a flow message
        if isinstance(payload, dict):
            if slack.is_shaped(payload):
                return slack.read(Incoming(payload, incoming.headers, incoming.per))
            if message := _message(payload):
                return [Notice(message=message)]
    if isinstance(payload, str | int | float) and (said := text({"": payload}, "")).strip():
        return [Notice(message={"text": said})]
    return [Notice(message={"html": summary(payload)})]


def _message(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a message; empty where there is nothing to say. What is of a wrong type is left out."""
    found = _said(payload)
    files = [
        each for each in objects(payload, "attachments") if any(isinstance(each.get(name), str) for name in _FILES)
    ]
    if files:
        found["attachments"] = files
    if not found:
        return {}
    has_text = any(name in found for name in _TEXTS)
    if has_text:
        for name, value in (("title", text(payload, "title").strip()), ("msgtype", _msgtype(payload))):
            if value:
                found[name] = value
        if isinstance(payload.get("mentions"), list | str):
            found["mentions"] = payload["mentions"]
        if payload.get("overflow") == "file":
            found["overflow"] = "file"
    if edit := text(payload, "edit"):
        found.pop("attachments", None)
        return {**found, "edit": edit} if has_text else {}
    found |= {name: value for name in ("reply_to", "thread", "key") if (value := text(payload, name).strip())}
    if "key" in found and payload.get("on_update") in _ON_UPDATE:
        found["on_update"] = payload["on_update"]
    return found


def _said(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Its text, as HTML where there is one, with the name of who says it."""
    format_, said = next(
        ((name, payload[name]) for name in ("html", "markdown", "text") if _is_text(payload.get(name))), ("text", "")
    )
    if not said:
        return {}
    if format_ == "text" and payload.get("format") in ("html", "markdown"):
        format_ = payload["format"]
    if payload.get("emoji") is True:
        said = with_emoji(said[:40_000])
    name = " ".join((text(payload, "username") or text(payload, "displayName"))[:MAX_NAME].split())
    if not name:
        return {format_: said}
    if format_ == "markdown":
        shown = _MARKS.sub(r"\\\1", name)
        return {"markdown": f"**{shown}**\n\n{said}" if _BLOCK.match(said) else f"**{shown}:** {said.lstrip()}"}
    shown = escape(name, quote=False)
    if format_ == "text":
        said = escape(said.strip(), quote=False).replace("\r\n", "\n").replace("\n", "<br>")
    is_block = format_ == "html" and said.lstrip().startswith("<")
    return {"html": f"<p><strong>{shown}</strong></p>{said}" if is_block else f"<strong>{shown}:</strong> {said}"}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _msgtype(payload: Mapping[str, Any]) -> str:
    return _MSGTYPES.get(text(mapping(payload), "msgtype"), "")


def _any(headers: Headers, payload: Any) -> bool:
    return True


def delivery_id(headers: Headers, payload: Any) -> str:
    """That of Standard Webhooks, or of an event of Stripe, which is sent again for days."""
    name = text(payload, "id")
    is_stripe = name.startswith("evt_") and text(payload, "object") == "event"
    return headers.get("webhook-id") or (name if is_stripe else "")


SOURCE = Source(
    "generic",
    "Anything else",
    _any,
    read,
    delivery_id=delivery_id,
    sample={"title": "Backup failed", "markdown": "**db-1** has not been saved since yesterday", "key": "backup-db-1"},
)
