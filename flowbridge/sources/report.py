"""How alerting tools' messages look: all alike, so that a room reads them alike. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from flowbridge.sources.markup import anchor, is_web, lines, shown
from flowbridge.sources.reading import dated, lasted, moment
from flowbridge.sources.source import Json, Markdown

FIRING, RESOLVED, NOTED, PAUSED = "🔥", "✅", "👀", "🔧"
MAX_PARTS = 150  # of a report: about what fits into an event
MAX_FACTS = 20
MAX_VALUE = 200  # characters
MAX_TEXT = 1_500

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
    """What `words` shows; each of `parts` is a report, too, of which only the title and what is around it is shown.

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


def words(view: Json, _: Markdown) -> str:
    """A report as HTML; `details` of the view, which are HTML, behind it."""
    it = view["report"]
    time, mark, outcome = _when(it), it["mark"], it["outcome"]
    found = [f"<p>{f'{mark} ' if mark else ''}<strong>{shown(it['title'])}</strong>"]
    found.append(f": {shown(outcome)}</p>\n" if outcome else "</p>\n")
    if it["text"]:
        found.append(f"<p>{lines(it['text'])}</p>")
    if it["facts"] or time:
        facts = " · ".join([f"{shown(name)}: {shown(value)}" for name, value in it["facts"]])
        found.append(f"<p>{facts}{'<br>' if facts and time else ''}{time}</p>\n")
    if it["parts"]:
        found.append(f"<ul>\n{''.join(map(_part, it['parts']))}</ul>\n")
    if it["more"]:
        found.append(f"<p>{shown(it['more'])}</p>")
    if it["links"]:
        found.append(f"<p>{' · '.join([anchor(name, url) for name, url in it['links']])}</p>\n")
    found.append(view.get("details", ""))
    return "".join(found)


def _part(it: Json) -> str:
    time = _when(it)
    said = [f"{shown(name)}: {shown(value)}" for name, value in it["facts"]]
    said += [time] if time else []
    more = " · ".join(said + [anchor(name, url) for name, url in it["links"]])
    title = f"{it['mark']} " * bool(it["mark"]) + f"<strong>{shown(it['title'])}</strong>"
    if it["text"]:
        return f"<li>{title}<br>{lines(it['text'])}{f'<br>{more}' if more else ''}</li>\n"
    return f"<li>{title}{f' · {more}' if more else ''}</li>\n"


def _when(it: Json) -> str:
    since, until = it["since"], it["until"]
    if until:
        lasting = lasted(since, until)
        return f"{it['ended']} {dated(until)}{f' after {lasting}' if lasting else ''}"
    return f"{it['began']} {dated(since)}" if since else ""


def _filled(facts: Pairs) -> list[tuple[str, str]]:
    return [(name, value) for name, value in facts if value.strip()][:MAX_FACTS]


def web(url: Any) -> str:
    """A URL that can be followed from a room; "" for anything else."""
    return url if is_web(url) else ""


def line(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"
