"""How alerting tools' messages look: one template, so that a room reads all of them alike. Pure."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from flowbridge.sources.reading import moment
from flowbridge.sources.source import Json

FIRING, RESOLVED, NOTED, PAUSED = "🔥", "✅", "👀", "🔧"
MAX_PARTS = 150  # of a report: about what fits into an event
MAX_FACTS = 20
MAX_VALUE = 200  # characters
MAX_TEXT = 1_500
MAX_URL = 2_000

TEMPLATE = """
{%- macro lines(text) %}
{% for line in text|lines %}{% if not loop.first %}<br>{% endif %}{{ line }}{% endfor %}
{% endmacro %}
{%- macro rest(part, time) %}
{% for name, value in part.facts %} · {{ name }}: {{ value }}{% endfor %}
{%- if time %} · {{ time }}{% endif %}
{%- for name, url in part.links %} · {{ name|link(url) }}{% endfor %}
{% endmacro %}
{%- macro when(it) %}
{% set lasted = it.since|duration(it.until) %}
{% if it.until %}{{ it.ended }} {{ it.until|datetime }}{% if lasted %} after {{ lasted }}{% endif %}
{% elif it.since %}{{ it.began }} {{ it.since|datetime }}{% endif %}
{% endmacro %}
{%- set time = when(report) %}
<p>{% if report.mark %}{{ report.mark }} {% endif %}<strong>{{ report.title }}</strong>
{%- if report.outcome %}: {{ report.outcome }}{% endif %}</p>
{% if report.text %}<p>{{ lines(report.text) }}</p>{% endif %}
{% if report.facts or time %}
<p>{% for name, value in report.facts %}{% if not loop.first %} · {% endif %}{{ name }}: {{ value }}{% endfor %}
{%- if report.facts and time %}<br>{% endif %}{{ time }}</p>
{% endif %}
{% if report.parts %}
<ul>
{% for part in report.parts %}
{% set more = rest(part, when(part))|trim %}
<li>{% if part.mark %}{{ part.mark }} {% endif %}<strong>{{ part.title }}</strong>
{%- if part.text %}<br>{{ lines(part.text) }}{% if more %}<br>{{ more[2:]|safe }}{% endif %}
{% elif more %} {{ more|safe }}{% endif %}</li>
{% endfor %}
</ul>
{% endif %}
{% if report.more %}<p>{{ report.more }}</p>{% endif %}
{% if report.links %}
<p>{% for name, url in report.links %}{% if not loop.first %} · {% endif %}{{ name|link(url) }}{% endfor %}</p>
{% endif %}
"""

_URL = re.compile(r"https?://[^\s<>\"]+", re.IGNORECASE)
_SPACES = re.compile(r"\s+")
Pairs = Iterable[tuple[str, str]]


def report(
    title: str,
    *,
    mark: str = "",
    outcome: str = "",
    text: str = "",
    facts: Pairs = (),
    since: Any = None,
    until: Any = None,
    began: str = "since",
    ended: str = "resolved",
    links: Pairs = (),
    parts: Sequence[Json] = (),
    more: str = "",
) -> Json:
    """What TEMPLATE shows; each of `parts` is a report, too, of which only the title and what is around it is shown.

    `facts`, `links`: names with what they are; empty ones are left out. `since`, `until`: what `moment` reads.
    """
    return {
        "mark": mark,
        "title": cut(line(title), MAX_VALUE) or "Untitled",
        "outcome": cut(line(outcome), MAX_VALUE),
        "text": cut(text.strip(), MAX_TEXT),
        "facts": [[cut(name, MAX_VALUE), cut(line(value), MAX_VALUE)] for name, value in _filled(facts)],
        "since": since if moment(since) is not None else None,
        "until": until if moment(until) is not None else None,
        "began": began,
        "ended": ended,
        "links": [[name, found] for name, given in links if (found := web(given))],
        "parts": list(parts),
        "more": more,
    }


def _filled(facts: Pairs) -> list[tuple[str, str]]:
    return [(name, value) for name, value in facts if value.strip()][:MAX_FACTS]


def web(url: Any) -> str:
    """A URL that can be followed from a room; "" for anything else."""
    return url if isinstance(url, str) and len(url) <= MAX_URL and _URL.fullmatch(url) else ""


def line(text: str) -> str:
    """A text on one line."""
    return _SPACES.sub(" ", text).strip()


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"
