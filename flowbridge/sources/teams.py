"""Microsoft Teams: the MessageCard of its old connectors, and the Adaptive Cards of its workflows.

https://learn.microsoft.com/en-us/outlook/actionable-messages/message-card-reference, https://adaptivecards.io/explorer
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowbridge.sources import parts
from flowbridge.sources.parts import Parts
from flowbridge.sources.reading import at, items, mapping, objects, text
from flowbridge.sources.source import Headers, Incoming, Notice, Source, UnrecognisedError

MAX_ELEMENTS = 1_000  # of a card, nested ones counted

_CARD = "application/vnd.microsoft.card."
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_DATE = re.compile(r"\{\{(?:DATE|TIME)\(([^(),{}]{1,40})[^(){}]{0,40}\)\}\}")
_NESTED = ("items", "columns", "body", "cells", "actions", "inlines", "images")


def read(incoming: Incoming) -> Sequence[Notice]:
    payload = incoming.payload
    if isinstance(payload, str):
        payload = {"text": payload}
    said = Parts()
    cards = [each for each in objects(payload, "attachments") if isinstance(each.get("content"), dict)]
    if _is_adaptive(payload):
        _add_elements(said, payload)
    elif cards:
        said.markdown(_plain(text(payload, "text")))
        for card in cards[:20]:
            content = mapping(card, "content")
            if _is_adaptive(content):
                _add_elements(said, content)
            else:
                _add_hero(said, content)
    else:
        _add_message_card(said, payload)
    if not said.found:
        raise UnrecognisedError("has nothing to show: it needs text, sections, or an Adaptive Card that holds a text")
    return [Notice(view={"parts": said.found})]


def _add_message_card(said: Parts, card: Any) -> None:
    said.title(_without_links(text(card, "title")))
    said.markdown(_plain(text(card, "text")))
    for section in objects(card, "sections"):
        _add_section(said, section)
    said.links(_actions(card))
    if not any("title" not in part for part in said.found):
        said.markdown(_plain(text(card, "summary")))


def _add_section(said: Parts, section: Mapping[str, Any]) -> None:
    said.title(_without_links(text(section, "title")))
    activity = (text(section, name) for name in ("activityTitle", "activitySubtitle", "activityText"))
    said.markdown("\n".join(_plain(each) for each in activity if each.strip()))
    said.markdown(_plain(text(section, "text")))
    said.facts((text(fact, "name"), _plain(text(fact, "value"))) for fact in objects(section, "facts"))
    pictures = [mapping(section, "heroImage"), *objects(section, "images")]
    said.links((text(each, "title") or "image", text(each, "image")) for each in pictures)
    said.links(_actions(section))


def _actions(value: Any) -> Iterator[tuple[str, str]]:
    """Of a MessageCard: buttons that open a page."""
    for action in objects(value, "potentialAction"):
        targets = [*objects(action, "targets"), {"uri": next(iter(items(action, "target")), "")}]
        yield text(action, "name"), next(filter(None, (text(target, "uri") for target in targets)), "")


def _add_hero(said: Parts, card: Mapping[str, Any]) -> None:
    """A hero or thumbnail card."""
    said.title(text(card, "title"))
    said.markdown(_plain(text(card, "subtitle")))
    said.markdown(_plain(text(card, "text")))
    said.links((text(each, "title"), text(each, "value")) for each in objects(card, "buttons"))


def _add_elements(said: Parts, card: Mapping[str, Any]) -> None:
    """In their order; what is nested in an element comes after its own text."""
    pending: list[Any] = [card]
    for _ in range(MAX_ELEMENTS):
        if not pending:
            return
        element = pending.pop()
        if not isinstance(element, dict) or element.get("isVisible") is False:
            continue
        kind = text(element, "type")
        if kind == "TextBlock":
            is_title = text(element, "style") == "heading" or (
                text(element, "weight").lower() == "bolder" and text(element, "size").lower() in ("large", "extralarge")
            )
            (said.title if is_title else said.markdown)(_plain(text(element, "text")))
        elif kind == "RichTextBlock":
            inlines = items(element, "inlines")
            said.text("".join(each if isinstance(each, str) else text(each, "text") for each in inlines))
        elif kind == "FactSet":
            said.facts((text(fact, "title"), _plain(text(fact, "value"))) for fact in objects(element, "facts"))
        elif kind == "Table":
            said.rows([[_cell(cell) for cell in items(row, "cells")] for row in objects(element, "rows")])
        elif kind == "CodeBlock":
            said.markdown(f"```\n{text(element, 'codeSnippet').replace('```', '')}\n```")
        elif kind == "Image":
            # Without a text it is an icon.
            said.links([(text(element, "altText"), text(element, "url"))] if _is_picture(element) else ())
        elif kind == "Action.OpenUrl":
            said.links([(text(element, "title"), text(element, "url"))])
        else:
            said.links([(text(element, "selectAction", "title"), text(element, "selectAction", "url"))])
            if kind == "ActionSet" or (kind == "AdaptiveCard" and not items(element, "body")):
                _add_buttons(said, element)
                continue
            if kind == "AdaptiveCard":
                pending.append({"type": "ActionSet", "actions": items(element, "actions")})
            nested = [each for name in ("items", "columns", "body") for each in items(element, name)]
            pending += nested[::-1]


def _add_buttons(said: Parts, element: Mapping[str, Any]) -> None:
    actions = objects(element, "actions")
    said.links((text(each, "title"), text(each, "url")) for each in actions if text(each, "type") == "Action.OpenUrl")


def _is_picture(element: Mapping[str, Any]) -> bool:
    return bool(text(element, "altText")) and not text(element, "height").endswith("px") and not text(element, "width")


def _cell(cell: Any) -> str:
    return " ".join(_plain(text(each, "text")) for each in objects(cell, "items"))


def _is_adaptive(value: Any) -> bool:
    return text(value, "type") == "AdaptiveCard"


def _plain(said: str) -> str:
    """Line breaks may come as tags; a date stands in `{{DATE(…)}}`."""
    return _DATE.sub(r"\1", _BREAK.sub("\n", said[: parts.MAX_CHARACTERS]))


def _without_links(said: str) -> str:
    """Titles are no Markdown; some senders write links into them all the same."""
    return re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", said[:1_000])


def _recognises(headers: Headers, payload: Any) -> bool:
    return (
        _is_adaptive(payload)
        or text(payload, "@type") == "MessageCard"
        or any(text(each, "contentType").startswith(_CARD) for each in objects(payload, "attachments"))
        or (any(True for _ in objects(payload, "sections")) and at(payload, "summary") is not None)
    )


SOURCE = Source(
    "teams",
    "Microsoft Teams",
    _recognises,
    read,
    template=parts.TEMPLATE,
    dialect=True,
    sample={
        "type": "message",
        "attachments": [
            {
                "contentType": "application/vnd.microsoft.card.adaptive",
                "content": {
                    "type": "AdaptiveCard",
                    "version": "1.4",
                    "body": [
                        {"type": "TextBlock", "text": "Backup of db-1 failed", "style": "heading"},
                        {"type": "FactSet", "facts": [{"title": "Host", "value": "db-1"}]},
                    ],
                    "actions": [
                        {"type": "Action.OpenUrl", "title": "What to do", "url": "https://wiki.example.org/backup"}
                    ],
                },
            }
        ],
    },
)
