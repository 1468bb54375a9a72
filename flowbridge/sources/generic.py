"""Anything that can POST: the keys of a message (contract §5), else a readable summary of any JSON."""

from collections.abc import Sequence
from typing import Any

from flowbridge.sources.source import Headers, Incoming, Nothing, Notice, Source
from flowbridge.sources.summary import summary

_TEXTS = ("text", "markdown", "html")
KEYS = (  # of a message, as events/message.py has them: a test holds them equal
    *_TEXTS,
    *("title", "msgtype", "mentions", "reply_to", "thread", "edit", "key", "on_update", "attachments", "overflow"),
)


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if isinstance(payload, str):
        return [Notice(message={"text": payload})]
    if isinstance(payload, dict) and any(isinstance(payload.get(name), str) for name in _TEXTS):
        return [Notice(message={name: payload[name] for name in KEYS if name in payload})]
    return [Notice(message={"html": summary(payload)})]


def _any(headers: Headers, payload: Any) -> bool:
    return True


SOURCE = Source("generic", "Anything else", _any, read)
