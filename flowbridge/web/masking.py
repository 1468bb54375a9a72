"""Paths as they may be shown: without the tokens that the URLs of hooks, and of the tools they stand in for, hold."""

import re
from urllib.parse import unquote

from flowbridge.hooks.definition import NAME
from flowbridge.hooks.known import PREFIX

MASK = "***"

# Where a token can stand, also in paths that nothing is served at: whoever mistypes one has a token in it all the same.
_FIRST = frozenset("hsaw%HSAW")  # of the paths below: most requests are for none of them
_TOKENS = re.compile(
    r"(/+(?:webhooks?|services|api/+webhooks/+[^/]*|api/+v1/+matrix/+hook)/+)(.*)", re.IGNORECASE | re.DOTALL
)
_HOOK = re.compile(r"(/+hooks?/+)([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
_OWN = ("/preview", "/rotate", "/test", "/requests")  # behind a hook's name, and no tokens


def masked(path: str) -> str:
    """A raw path, as it may be logged, counted and answered."""
    if path[1:2] in _FIRST:
        path = _masked_behind(path)
    if PREFIX in path:
        path = "/".join(MASK if PREFIX in segment else segment for segment in path.split("/"))
    return path


def _masked_behind(path: str) -> str:
    plain = unquote(path)
    if found := _HOOK.fullmatch(plain):
        start, name, rest = found.groups()
        name = name if not name or NAME.fullmatch(name) else MASK
        return start + name + (rest if rest.startswith(_OWN) else _hidden(rest))
    if found := _TOKENS.fullmatch(plain):
        return found[1] + _hidden(found[2])
    return path


def _hidden(segments: str) -> str:
    return "/".join(MASK if segment else "" for segment in segments.split("/"))
