"""Templates of hooks: minijinja, with filters for what people do with fields of a webhook. In the render process.

What fills a template is the payload, from outside: in an HTML template values are escaped, in a Markdown template too,
so that `__init__` stays what it is. A template that says `|markdown` or `|safe` means it: the result is cleaned all the
same.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from minijinja import Environment, TemplateError, escape, pass_state, safe
from minijinja._lowlevel import State

from flowbridge.rendering import formats
from flowbridge.sources.reading import moment

MAX_TEMPLATE_BYTES = 16 * 1024
FUEL = 200_000  # instructions: 20 ms of a loop; a list of 1,000 alerts takes 40,000
MAX_KEPT = 256  # compiled templates

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&])")
_LINK = re.compile(r"https?://[^\s<>\"]+", re.IGNORECASE)


class Template:
    """Compiled templates for members of a message. Raises TemplateError when made, or rendered."""

    def __init__(self, sources: tuple[tuple[str, str], ...]) -> None:
        self._environment = Environment(
            filters=_FILTERS,
            fuel=FUEL,
            debug=False,
            pycompat=False,
            undefined_behavior="chainable",
            auto_escape_callback=lambda name: "html" if name == "html" else None,
            trim_blocks=True,
            lstrip_blocks=True,
            finalizer=_shown,
        )
        for member, source in sources:
            self._environment.add_template(member, source)
        self._members = [member for member, _ in sources]

    def render(self, view: dict[str, Any]) -> dict[str, str]:
        """The members that are not empty."""
        found = {member: self._environment.render_template(member, **view) for member in self._members}
        return {member: value.strip() for member, value in found.items() if value.strip()}


compiled = lru_cache(MAX_KEPT)(Template)


@pass_state
def _shown(state: State, value: Any) -> Any:
    if value is None or callable(value):  # `payload.items` where there is no such key: the dict's own method
        return ""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    if state.name == "markdown" and isinstance(value, str) and not hasattr(value, "__html__"):
        return safe(_MARKDOWN.sub(r"\\\1", value))
    return value


@pass_state
def _link(state: State, text: Any, url: Any = None) -> str:
    """`{{ title|link(url) }}`; the text alone where the URL is none of http or https."""
    address = url if url is not None else text
    if not isinstance(address, str) or not _LINK.fullmatch(address):
        return str(_shown(state, text))
    if state.name == "markdown":
        label = _MARKDOWN.sub(r"\\\1", str(text))
        return safe(f"[{label}](<{address.replace('>', '%3E')}>)")
    if state.name == "html":
        return safe(f'<a href="{escape(address)}">{escape(str(text))}</a>')
    return address if text == address else f"{text} ({address})"


@pass_state
def _markdown(state: State, text: Any) -> str:
    """Text that its author wrote in Markdown."""
    source = "" if text is None else str(text)
    if state.name != "html":
        return safe(source)
    body, html = formats.markdown(source[:MAX_TEMPLATE_BYTES], ())
    return safe(html if html is not None else escape(body))


@pass_state
def _code(state: State, text: Any) -> str:
    source = "" if text is None else str(text)
    if state.name == "html":
        return safe(f"<code>{escape(source)}</code>") if source else ""
    if state.name == "markdown" and source:
        fence = "`" * (max((len(found) for found in re.findall(r"`+", source)), default=0) + 1)
        return safe(f"{fence} {source} {fence}" if fence != "`" else f"`{source}`")
    return source


def _truncate(text: Any, length: int = 200) -> str:
    """The beginning of a text, up to the end of a word."""
    found = "" if text is None else str(text)
    if len(found) <= length:
        return found
    start = found[: max(1, length - 1)]
    return f"{start.rsplit(None, 1)[0] if ' ' in start[length // 2 :] else start}…"


def _datetime(value: Any) -> str:
    """`2026-11-22 10:00 UTC`, of an ISO 8601 text or a number; what is neither stays as it is."""
    from datetime import UTC, datetime

    at = moment(value)
    if at is None:
        return "" if value is None else str(value)
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: Any, until: Any = None) -> str:
    """`3 h 5 min`, of seconds, or from one moment until another."""
    if until is not None:
        start, end = moment(seconds), moment(until)
        if start is None or end is None:
            return ""
        seconds = (end - start) / 1000
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min"
    if whole < 86_400:
        hours, minutes = whole // 3_600, whole % 3_600 // 60
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = whole // 86_400, whole % 86_400 // 3_600
    return f"{days} d {hours} h" if hours else f"{days} d"


def _fromjson(text: Any) -> Any:
    """JSON inside of a text; the text where it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def _mask(text: Any) -> str:
    return "•••" if text not in (None, "") else ""


_FILTERS: dict[str, Callable[..., Any]] = {
    "link": _link,
    "markdown": _markdown,
    "code": _code,
    "truncate": _truncate,
    "datetime": _datetime,
    "duration": _duration,
    "fromjson": _fromjson,
    "mask": _mask,
}
__all__ = ["MAX_TEMPLATE_BYTES", "TemplateError", "compiled"]
