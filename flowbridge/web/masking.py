"""Paths as they may be shown: without the tokens that the URLs of hooks, and of the tools they stand in for, hold."""

import re
from urllib.parse import unquote

from flowbridge.hooks.definition import NAME
from flowbridge.hooks.known import PREFIX

MASK = "***"

PLAIN = frozenset("r_")  # rooms, and the Matrix surface: no URL of a hook begins so
# Where a token can stand, also in paths that nothing is served at: whoever mistypes one has a token in it all the same.
_TOKENS = re.compile(
    r"(/+(?:webhooks?|services|api/+webhooks/+[^/]*|api/+v1/+matrix/+hook)/+)(.*)", re.IGNORECASE | re.DOTALL
)
_HOOK = re.compile(r"(/+hooks?/+)([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
_OWN = frozenset({"preview", "rotate", "test", "requests"})  # behind a hook's name, and no tokens


def masked(path: str) -> str:
    """A raw path, as it may be logged, counted and answered."""
    plain = unquote(path)
    if found := _HOOK.fullmatch(plain):
        start, name, rest = found.groups()
        name = name if not name or NAME.fullmatch(name) else MASK
        is_own = rest[1:].partition("/")[0] in _OWN
        return start + name + (rest if is_own else _hidden(rest))
    if found := _TOKENS.fullmatch(plain):
        return found[1] + _hidden(found[2])
    if PREFIX in plain:  # of whoever takes another path for a hook's
        return "/".join(MASK if PREFIX in unquote(segment) else segment for segment in path.split("/"))
    return path


def _hidden(segments: str) -> str:
    return "/".join(MASK if segment else "" for segment in segments.split("/"))
