"""What becomes of a text: the work of the render process. Nothing here is bounded; see `child`."""

import re
from collections.abc import Sequence
from html import unescape

from comrak import ExtensionOptions, RenderOptions, render_markdown

from flowbridge.rendering.cleaning import clean
from flowbridge.rendering.pills import with_pills
from flowbridge.rendering.reading import text_of

MAX_CELLS = 2_000  # of all tables: each row is as wide as the head, so 14 kB can be 4 million cells

_EXTENSIONS = ExtensionOptions()
_EXTENSIONS.table = _EXTENSIONS.strikethrough = True
_OPTIONS = RenderOptions()
_OPTIONS.hardbreaks = True  # a line break is one, as in every chat
_OPTIONS.escape = True  # HTML inside of Markdown is text
_LINES = re.compile(r"\r\n|\r|\n")
_DASHES = frozenset(" \t>|:-")


class RefusedError(ValueError):
    """What is wrong with the text, as its author reads it."""


def markdown(source: str, users: Sequence[str]) -> tuple[str, str | None]:
    """CommonMark with tables and strikethrough: the body, which is the source, and its HTML if that adds something."""
    if "|" in source and _cells(source) > MAX_CELLS:
        raise RefusedError(f"has tables of more than {MAX_CELLS} cells")
    html = with_pills(clean(render_markdown(source, _EXTENSIONS, render_options=_OPTIONS)).strip(), users)
    if html.startswith("<p>") and html.endswith("</p>") and html.rfind("<p>") == 0:  # one paragraph is a line
        html = html[len("<p>") : -len("</p>")]
    return source, None if "<" not in html and unescape(html) == source.strip() else html


def _cells(source: str) -> int:
    """How many cells all tables would have: a row below the line of dashes needs no bar of its own."""
    cells, columns = 0, 0
    for line in _LINES.split(source):
        if "|" in line and "-" in line and _DASHES.issuperset(line):
            columns = line.count("|") + 1
        elif not line.strip():
            columns = 0
        cells += columns
    return cells


def html(source: str, users: Sequence[str]) -> tuple[str, str | None]:
    """The HTML that Matrix allows, and its text as the body."""
    found = clean(source).strip()
    body = text_of(found)
    if not body.strip():
        raise RefusedError("holds nothing that a room could show")
    return body, with_pills(found, users)
