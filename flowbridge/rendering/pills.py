"""Pills: a user id in a text becomes a link, which clients show as the user's name (specification, "User mentions")."""

import re
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

TAG = re.compile(r'(<(?:[^<>"]|"[^"]*")*>)')  # in HTML that has been cleaned
_NAME = re.compile(r"</?([a-z0-9]+)")
_VERBATIM = frozenset({"a", "code", "pre"})  # no link in a link, and code is shown as it is


def with_pills(html: str, users: Sequence[str]) -> str:
    """The HTML, which has been cleaned, with a link wherever one of these user ids stands in its text."""
    named = [user for user in users if escape(user, quote=False) in html]
    if not named:
        return html
    # The longest first: @al:hs is in @al:hs.example.
    names = sorted((escape(user, quote=False) for user in named), key=len, reverse=True)
    any_of = re.compile(r"(?<![\w@:])(?:" + "|".join(map(re.escape, names)) + r")(?!\w|[.:-]\w)")
    links = {escape(user, quote=False): _link(user) for user in named}
    pieces, inside = TAG.split(html), 0
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = piece if inside else any_of.sub(lambda found: links[found[0]], piece)
        elif (name := _NAME.match(piece)) and name[1] in _VERBATIM:
            inside = max(0, inside + (-1 if piece.startswith("</") else 1))
    return "".join(pieces)


def _link(user: str) -> str:
    return f'<a href="https://matrix.to/#/{quote(user, safe="@:!$()*+,;=~._-")}">{escape(user, quote=False)}</a>'
