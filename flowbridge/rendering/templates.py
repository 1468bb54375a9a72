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
from flowbridge.sources import markup
from flowbridge.sources.reading import dated, depth_of, lasted, plain

FUEL = 500_000  # instructions: a list of 1,000 alerts with 20 labels each takes 400,000, and 50 ms
MAX_OUTPUT = 4 * 1024 * 1024  # characters of one member: the longest body that is taken makes 2 MB, which are cut
MAX_KEPT = 256  # compiled templates
MAX_MARKDOWN = 16 * 1024  # characters, as everywhere
MAX_DEPTH = 64

TOO_LONG = "takes too many steps: make its loops shorter"

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&=])")
_BLOCKS = ("<p", "<h", "<ul", "<ol", "<pre", "<blockquote", "<table")
_PLACE = re.compile(r" \(in \w+(?::\d+)?\)")


class FailedError(ValueError):
    """A template cannot be rendered, for a reason that minijinja has no error for. One line, for its author."""


class Template:
    """Compiled templates for members of a message. Raises TemplateError, and FailedError when rendered."""

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
        found = {}
        for member in self._members:
            if text := self._rendered(member, view).strip():
                found[member] = text
        return found

    def _rendered(self, member: str, view: dict[str, Any]) -> str:
        try:
            found = self._environment.render_template(member, **view)
        except (TemplateError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a method of a value raises what it likes, and a panic is no Exception
            said = " ".join(str(error).split())[:200]
            raise FailedError(f"`{member}`: {type(error).__name__}: {said}") from None
        if len(found) > MAX_OUTPUT:
            raise FailedError(f"`{member}` becomes longer than {MAX_OUTPUT // 1024 // 1024} MiB")
        return found


compiled = lru_cache(MAX_KEPT)(Template)


def worded(error: BaseException) -> str:
    """What is wrong, in one line, as the template's author reads it: `line 2 of html: filter nope is unknown`."""
    if not isinstance(error, TemplateError):
        return str(error)[:300] or type(error).__name__
    if error.kind == "OutOfFuel":
        what = TOO_LONG
    else:
        what = _PLACE.sub("", " ".join((error.detail or str(error).split("\n", 1)[0]).split()))[:300]
    return f"line {error.line} of {error.name}: {what}" if error.line else what


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
def _link(state: State, text: Any, url: Any = None) -> Any:
    """`{{ title|link(url) }}`; the text alone where the URL is none of http or https."""
    label = plain(text)
    address = label if url is None else url
    if not markup.is_web(address):
        return _shown(state, text)
    if state.name == "markdown":
        shown = label if hasattr(text, "__html__") else _MARKDOWN.sub(r"\\\1", label)
        return safe(f"[{shown}](<{address}>)")
    if state.name == "html":
        return safe(f'<a href="{escape(address)}">{escape(text if hasattr(text, "__html__") else label)}</a>')
    return address if label == address else f"{label} ({address})"


@pass_state
def _markdown(state: State, text: Any, blocks: bool = False) -> Any:
    """Text that its author wrote in Markdown. `blocks`: in HTML, a paragraph alone has its tag, too."""
    source = plain(text)[:MAX_MARKDOWN]
    if state.name != "html":
        return safe(source)
    found = as_html(source)
    return safe(f"<p>{found}</p>" if blocks and found and not found.startswith(_BLOCKS) else found)


def as_html(source: str) -> str:
    """Text that its author wrote in Markdown."""
    source = source[:MAX_MARKDOWN]
    try:
        body, html = formats.markdown(source, ())
    except ValueError:  # too large a table
        return markup.lines(source.strip())
    return html if html is not None else markup.shown(body.strip())


@pass_state
def _breaks(state: State, text: Any) -> Any:
    """The text with its line breaks, which HTML would lose."""
    source = plain(text).strip().replace("\r\n", "\n")
    if state.name != "html":
        return _shown(state, source)
    return safe(str(escape(source)).replace("\n", "<br>"))


@pass_state
def _code(state: State, text: Any) -> str:
    source = plain(text)
    if state.name == "html":
        return safe(f"<code>{escape(source)}</code>") if source else ""
    if state.name == "markdown" and source:
        fence = "`" * (max((len(found) for found in re.findall(r"`+", source)), default=0) + 1)
        return safe(f"{fence} {source} {fence}" if fence != "`" else f"`{source}`")
    return source


def _truncate(text: Any, length: int = 200) -> str:
    """The beginning of a text, up to the end of a word."""
    found = plain(text)
    if len(found) <= length:
        return found
    start = found[: max(1, length - 1)]
    return f"{start.rsplit(None, 1)[0] if ' ' in start[length // 2 :] else start}…"


def _fromjson(text: Any) -> Any:
    """JSON inside of a text; the text where it is none, or nested deeper than a body may be."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text
    return found if depth_of(found, MAX_DEPTH) <= MAX_DEPTH else text


def _mask(text: Any) -> str:
    return "•••" if text not in (None, "") else ""


_FILTERS: dict[str, Callable[..., Any]] = {
    "link": _link,
    "markdown": _markdown,
    "breaks": _breaks,
    "code": _code,
    "truncate": _truncate,
    "datetime": dated,
    "duration": lasted,
    "fromjson": _fromjson,
    "mask": _mask,
}
