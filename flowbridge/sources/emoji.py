"""`:warning:` as ⚠️: the names that Slack, ntfy and GitHub share. Comrak knows all of them (GitHub's list)."""

import re
from collections.abc import Callable
from functools import cache, lru_cache, partial

_NAME = re.compile(r"[a-z0-9_+-]{1,40}")
_SHORTCODE = re.compile(r"(?<!\w):([a-z0-9_+-]{1,40}):(?!\w)")


@lru_cache(1_024)
def emoji(name: str) -> str:
    """The emoji of this name; "" where there is none."""
    if not _NAME.fullmatch(name):
        return ""
    shown = _renderer()(f":{name}:").removeprefix("<p>").removesuffix("</p>\n")
    return "" if shown.isascii() else shown


@cache
def _renderer() -> Callable[[str], str]:
    from comrak import ExtensionOptions, render_markdown  # the bridge, which knows the sources' names, needs none of it

    options = ExtensionOptions()
    options.shortcodes = True
    return partial(render_markdown, extension_options=options)


def with_emoji(text: str) -> str:
    """The text with emoji for the names that are known. A time, `10:30:45`, is none."""
    return _SHORTCODE.sub(lambda found: emoji(found[1]) or found[0], text) if ":" in text else text
