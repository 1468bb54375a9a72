"""Google Chat's cards, which come where `text` does not (https://developers.google.com/workspace/chat/api/reference/rest/v1/cards).

Its texts hold a few tags of HTML, which are shown for what they are: the result is cleaned as all HTML is.
"""

import re
from collections.abc import Iterator, Mapping
from html import escape, unescape
from typing import Any

from flowbridge.sources.mrkdwn import link
from flowbridge.sources.reading import mapping, objects, text

MAX_WIDGETS = 100

_TAG = re.compile(r"</?(?:b|i|u|s|strike|strong|em|br|font|a)\b[^<>]*>", re.IGNORECASE)


def blocks(payload: Any) -> list[str]:
    found: list[str] = []
    cards = [mapping(each, "card") for each in objects(payload, "cardsV2")] + list(objects(payload, "cards"))
    for card in cards[:MAX_WIDGETS]:
        header = mapping(card, "header")
        found += [f"<p><strong>{_plain(text(header, 'title'))}</strong></p>"] if text(header, "title") else []
        found += [f"<p>{_plain(text(header, 'subtitle'))}</p>"] if text(header, "subtitle") else []
        for section in objects(card, "sections"):
            found += [f"<p><strong>{_plain(text(section, 'header'))}</strong></p>"] if text(section, "header") else []
            for widget in objects(section, "widgets"):
                found += [f"<p>{each}</p>" for each in _widget(widget) if each]
                if len(found) > MAX_WIDGETS:
                    return found
    return found


def _widget(widget: Mapping[str, Any]) -> Iterator[str]:
    yield _plain(text(widget, "textParagraph", "text"))
    for name, body in (("decoratedText", "text"), ("keyValue", "content")):
        fact = mapping(widget, name)
        label, said, below = (_plain(text(fact, key)) for key in ("topLabel", body, "bottomLabel"))
        yield ": ".join(filter(None, (label and f"<strong>{label.rstrip(':')}</strong>", said)))
        yield below
    yield _address(text(widget, "image", "imageUrl"), "image")
    buttons = [*objects(widget, "buttonList", "buttons"), *objects(widget, "buttons")]
    links = []
    for button in buttons[:20]:
        given = mapping(button, "textButton") or button
        links.append(_address(text(given, "onClick", "openLink", "url"), text(given, "text") or "open"))
    yield " · ".join(filter(None, links))


def _address(url: str, name: str) -> str:
    return link(url, name) if url else ""


def _plain(said: str) -> str:
    shown = _TAG.sub(lambda tag: "\n" if tag[0].lower().startswith("<br") else "", said[:10_000])
    return escape(unescape(shown.strip()), quote=False).replace("\n", "<br>")
