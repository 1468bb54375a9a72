"""What becomes of a text: the work of the render process. Nothing here is bounded; see `child`."""

import re
from collections.abc import Sequence
from html import unescape

from markdown_it import MarkdownIt

from flowbridge.rendering.cleaning import clean
from flowbridge.rendering.pills import with_pills
from flowbridge.rendering.reading import text_of

MAX_CELLS = 20_000  # of all tables, about: each row is as wide as the head, so 14 kB were 4 million cells

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_PARAGRAPH = re.compile(r"<p>((?:(?!<p>).)*)</p>", re.DOTALL)


class RefusedError(ValueError):
    """What is wrong with the text, as its author reads it."""


def markdown(source: str, users: Sequence[str]) -> tuple[str, str | None]:
    """CommonMark with tables and strikethrough: the body, which is the source, and its HTML if that adds something."""
    rows = [line.count("|") for line in source.splitlines() if "|" in line]
    if rows and max(rows) * len(rows) > MAX_CELLS:
        raise RefusedError(f"has tables of more than {MAX_CELLS} cells")
    html = with_pills(clean(_MARKDOWN.render(source)).strip(), users)
    paragraph = _PARAGRAPH.fullmatch(html)
    html = paragraph[1] if paragraph else html
    return source, None if "<" not in html and unescape(html) == source.strip() else html


def html(source: str, users: Sequence[str]) -> tuple[str, str | None]:
    """The HTML that Matrix allows, and its text as the body."""
    found = clean(source).strip()
    body = text_of(found)
    if not body.strip():
        raise RefusedError("holds nothing that a room could show")
    return body, with_pills(found, users)
