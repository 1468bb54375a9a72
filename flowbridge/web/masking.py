"""Paths as they may be shown: without the tokens that the URLs of hooks, and of the tools they stand in for, hold."""

import re
from collections.abc import Callable
from urllib.parse import unquote

from flowbridge.hooks.known import PREFIX

MASK = "***"

PLAIN = ("/rooms/", "/_matrix/")  # no URL of a hook begins so
# Where a token can stand, also in paths that nothing is served at: whoever mistypes one has a token in it all the same,
# and so has a proxy that passes its own prefix on.
_TOKENS = re.compile(
    r"(.*?/(?:webhooks?|services|api/+webhooks/+[^/]*|api/+v1/+matrix/+hook)/+)(.*)", re.IGNORECASE | re.DOTALL
)
_HOOK = re.compile(r"(.*?/hooks?/+)([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
_OWN = re.compile(r"/(?:preview|rotate|test|requests(?:/[0-9]{0,18})?)/?")  # behind a hook's name, and no tokens


def masked(path: str, is_hook: Callable[[str], bool]) -> str:
    """A raw path, as it may be logged and answered. `is_hook`: tells the name of a hook, which may be shown.

    Whatever else stands in its place may be a token.
    """
    if path.startswith(PLAIN) and PREFIX not in path:
        return path
    plain = unquote(path)
    if found := _HOOK.fullmatch(plain):
        start, name, rest = found.groups()
        name = name if not name or is_hook(name) else MASK
        return start + name + (rest if _OWN.fullmatch(rest) else _hidden(rest))
    if found := _TOKENS.fullmatch(plain):
        return found[1] + _hidden(found[2])
    if PREFIX in plain:  # of whoever takes another path for a hook's
        return "/".join(MASK if PREFIX in unquote(segment) else segment for segment in path.split("/"))
    return path


def _hidden(segments: str) -> str:
    return "/".join(MASK if segment else "" for segment in segments.split("/"))
