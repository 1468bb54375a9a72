"""Gotify's messages (https://gotify.net/docs/pushmsg, https://gotify.net/docs/msgextras)."""

from collections.abc import Sequence
from typing import Any

from flowbridge.sources import parts
from flowbridge.sources.parts import Parts
from flowbridge.sources.reading import at, text
from flowbridge.sources.source import Headers, Incoming, Notice, Source, UnrecognisedError

HIGH = 8  # its app makes a sound from 4 on, and shows what is from 8 on above all else

_KEYS = frozenset(("title", "message", "priority", "extras", "id", "appid", "date"))


def read(incoming: Incoming) -> Sequence[Notice]:
    payload = incoming.payload
    if isinstance(payload, str):
        payload = {"message": payload}
    extras = at(payload, "extras")
    said = Parts()
    click = text(extras, "client::notification", "click", "url")
    said.title(text(payload, "title"), click)
    is_markdown = text(extras, "client::display", "contentType") == "text/markdown"
    (said.markdown if is_markdown else said.text)(text(payload, "message"))
    if not said.found:
        raise UnrecognisedError("has nothing to show: it needs a message")
    priority = at(payload, "priority")
    if isinstance(priority, int | float) and HIGH <= priority <= 10:
        said.facts([("Priority", str(int(priority)))])
    picture = text(extras, "client::notification", "bigImageUrl")
    said.links([("Open", "" if text(payload, "title") else click), ("image", picture)])
    return [Notice(view={"parts": said.found})]


def _recognises(headers: Headers, payload: Any) -> bool:
    return (
        isinstance(payload, dict)
        and isinstance(payload.get("message"), str)
        and payload.keys() <= _KEYS
        and (isinstance(payload.get("priority"), int) or isinstance(payload.get("extras"), dict))
    )


SOURCE = Source(
    "gotify",
    "Gotify",
    _recognises,
    read,
    template=parts.TEMPLATE,
    dialect=True,
    sample={
        "title": "Backup failed",
        "message": "**db-1** has not been saved since yesterday",
        "priority": 8,
        "extras": {"client::display": {"contentType": "text/markdown"}},
    },
)
