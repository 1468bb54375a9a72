"""HTML as sources write it, where a template would take longer than all else (five times as long as these). Pure.

What is written so needs no cleaning, mostly: see `is_clean` in rendering/cleaning.py.
"""

import re
from html import escape
from typing import Any

MAX_URL = 2_000

_URL = re.compile(r"https?://[^\s<>\"]+", re.IGNORECASE)


def is_web(url: Any) -> bool:
    """Whether it can be followed from a room."""
    return isinstance(url, str) and len(url) <= MAX_URL and bool(_URL.fullmatch(url))


def shown(text: str) -> str:
    """Text in HTML."""
    return escape(text, quote=False)


def link(text: str, url: Any) -> str:
    """The text alone where the URL cannot be followed."""
    return anchor(text, url) if is_web(url) else shown(text)


def anchor(text: str, url: str) -> str:
    """As `link`, for a URL that can be followed."""
    return f'<a href="{shown(url)}">{shown(text)}</a>'


def code(text: str) -> str:
    return f"<code>{shown(text)}</code>" if text else ""


def lines(text: str) -> str:
    return shown(text).replace("\r\n", "\n").replace("\n", "<br>")
