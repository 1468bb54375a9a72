"""Whether a hook's own template works, before it is kept. In the render process; see `child`."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from minijinja import TemplateError

from flowbridge import sources
from flowbridge.rendering.templates import TOO_LONG, compiled
from flowbridge.sources.source import Incoming, Nothing, Notice, Source

# Of these the payload is innocent: they are wrong with any.
_ALWAYS = frozenset({"UnknownFilter", "UnknownFunction", "UnknownTest", "OutOfFuel", "TemplateNotFound", "BadEscape"})
Json = dict[str, Any]


def check(source: str, given: Mapping[str, Any]) -> tuple[str, None]:
    """`given`: `template`, `per`. Out: `wrong`, pairs of a member and what is wrong with its template; `warnings`."""
    template: Mapping[str, str] = given["template"]
    wrong = [[member, error] for member, text in template.items() if (error := _compiles(member, text))]
    warnings: list[str] = []
    if not wrong:
        views, is_sample = _views(source, given["per"])
        for member, text in template.items():
            if error := _fails(member, text, views, is_sample=is_sample):
                wrong.append([member, error])
        texts = [member for member in template if member in ("text", "markdown", "html")]
        if is_sample and not wrong and not any(_says(member, template[member], views) for member in texts):
            warnings.append(f"of a request as {source} sends them it makes no text: a summary would be sent")
    return json.dumps({"wrong": wrong, "warnings": warnings}), None


def _compiles(member: str, text: str) -> str:
    try:
        compiled(((member, text),))
    except TemplateError as error:
        return _worded(error)
    return ""


def _fails(member: str, text: str, views: list[Json], *, is_sample: bool) -> str:
    for view in views:
        try:
            _rendered(member, text, view)
        except TemplateError as error:
            if is_sample or error.kind in _ALWAYS:
                return _worded(error)
        except Exception as error:  # of a filter, or a method of a value
            if is_sample:
                return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _says(member: str, text: str, views: list[Json]) -> bool:
    return any(_rendered(member, text, view) for view in views)


def _worded(error: TemplateError) -> str:
    """Without the text around it, which minijinja draws."""
    what = " ".join(str(getattr(error, "detail", None) or error).split())[:300]
    what = TOO_LONG if error.kind == "OutOfFuel" else what
    line = getattr(error, "line", None)
    return f"{what} (line {line})" if line else what


def _views(name: str, per: str) -> tuple[list[Json], bool]:
    """What templates see of a request as this source sends them; of an empty one where it has no sample."""
    source = sources.BY_NAME.get(name)
    if source is None or source.sample is None:
        return [_view(name, Notice(), {}, {})], False
    return list(_of_sample(source, per)), True


def _of_sample(source: Source, per: Any) -> Iterator[Json]:
    found = source.read(Incoming(source.sample, source.sample_headers, per))
    for notice in [Notice()] if isinstance(found, Nothing) else found:
        yield _view(source.name, notice, source.sample, source.sample_headers)


def _rendered(member: str, text: str, view: Json) -> Json:
    """A template can change what it is given (`payload.alerts.clear()`), and the sample is of use to others, too."""
    return compiled(((member, text),)).render(deepcopy(view))


def _view(source: str, notice: Notice, payload: Any, headers: Mapping[str, str]) -> Json:
    return {
        **notice.view,
        "payload": payload,
        "headers": dict(headers),
        "source": source,
        "event": notice.event,
        "key": notice.key,
        "state": notice.state,
    }
