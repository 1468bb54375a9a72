"""What several chat tools' messages are made of: parts of few kinds, and the template that words them.

A part is one of {"title", "url"?} · {"markdown"} · {"text"} · {"facts": [{"name", "value"}]} (values in Markdown) ·
{"links": [{"text", "url"}]} · {"rows": [[cell, …]]}.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from flowbridge.sources.source import Json

MAX_PARTS = 200
MAX_CHARACTERS = 40_000  # of all texts: an event holds fewer

TEMPLATE = """
{% if username %}
<p><strong>{{ username }}</strong></p>
{% endif %}
{% for part in parts %}
{% if part.title %}
<p><strong>{{ part.title|link(part.url or "") }}</strong></p>
{% elif part.markdown %}
{{ part.markdown|markdown(blocks=true) }}
{% elif part.text %}
<p>{{ part.text|breaks }}</p>
{% elif part.facts %}
<ul>
{% for fact in part.facts %}
<li>{% if fact.name %}<strong>{{ fact.name }}</strong>{{ ": " if fact.value }}{% endif %}{{ fact.value|markdown }}</li>
{% endfor %}
</ul>
{% elif part.rows %}
<table>
{% for row in part.rows %}
<tr>{% for cell in row %}<td>{{ cell|markdown }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% elif part.links %}
<p>{% for each in part.links %}{{ " · " if not loop.first }}{{ each.text|link(each.url) }}{% endfor %}</p>
{% endif %}
{% endfor %}
"""


class Parts:
    """Collects parts; what is empty is no part, and what is beyond the bounds is left out."""

    def __init__(self) -> None:
        self.found: list[Json] = []
        self._left = MAX_CHARACTERS

    def title(self, text: str, url: str = "") -> None:
        if shown := " ".join(self._taken(text).split()):
            self._add({"title": shown, "url": url})

    def markdown(self, text: str) -> None:
        if shown := self._taken(text):
            self._add({"markdown": shown})

    def text(self, text: str) -> None:
        if shown := self._taken(text):
            self._add({"text": shown})

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Names and values."""
        found = [
            {"name": " ".join(self._taken(name).split()).rstrip(": "), "value": self._taken(value)}
            for (name, value), _ in zip(facts, range(MAX_PARTS), strict=False)
        ]
        if found := [fact for fact in found if fact["name"] or fact["value"]]:
            self._add({"facts": found})

    def links(self, links: Iterable[tuple[str, str]]) -> None:
        """Texts and addresses."""
        found = [
            {"text": self._taken(text) or url, "url": url}
            for (text, url), _ in zip(links, range(MAX_PARTS), strict=False)
            if url.lower().startswith(("https://", "http://", "mailto:"))
        ]
        if found:
            self._add({"links": found})

    def rows(self, rows: Sequence[Sequence[str]]) -> None:
        found = [[self._taken(cell) for cell in row[:20]] for row in rows[:MAX_PARTS]]
        if any(any(row) for row in found):
            self._add({"rows": found})

    def _add(self, part: dict[str, Any]) -> None:
        if len(self.found) < MAX_PARTS:
            self.found.append(part)

    def _taken(self, text: str) -> str:
        text = text.strip()
        taken = text[: self._left]
        self._left -= len(taken)
        return taken if len(taken) == len(text) else f"{taken}…"
