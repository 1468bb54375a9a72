"""Any JSON, as a person can read it: what is sent where there is no template, or it fails. Pure."""

import re
from html import escape
from typing import Any

MAX_ROWS = 30
MAX_VALUE = 300  # characters
MASK = "•••"

_SECRET = re.compile(r"pass|token|secret|authorization|cookie|headers|api[_-]?key|credential", re.IGNORECASE)


def summary(value: Any, title: str = "") -> str:
    """HTML: a list of what the value holds, its nested keys joined by dots, without secrets."""
    rows: list[str] = []
    total = _add(rows, "", value)
    head = f"<p><strong>{escape(title)}</strong></p>" if title else ""
    more = f"<p>… and {total - MAX_ROWS} more</p>" if total > MAX_ROWS else ""
    return f"{head}<ul>{''.join(rows)}</ul>{more}" if rows else f"{head}<p>An empty request.</p>"


def is_secret(name: str) -> bool:
    return bool(_SECRET.search(name))


def _add(rows: list[str], root: str, value: Any) -> int:
    """Add up to MAX_ROWS rows; returns how many there would be."""
    total, pending = 0, [(root, value)]
    while pending:
        name, found = pending.pop()
        if is_secret(name.rpartition(".")[2]) and found not in (None, "", [], {}):
            found = MASK
        if isinstance(found, dict):
            pending.extend((f"{name}.{key}" if name else key, item) for key, item in reversed(found.items()))
        elif isinstance(found, list):
            pending.extend(
                (f"{name}.{number}" if name else str(number), found[number - 1]) for number in range(len(found), 0, -1)
            )
        elif found is not None and found != "":
            total += 1
            if len(rows) < MAX_ROWS:
                shown = "yes" if found is True else "no" if found is False else str(found)
                shown = shown if len(shown) <= MAX_VALUE else f"{shown[:MAX_VALUE]}…"
                rows.append(
                    f"<li><strong>{escape(name)}</strong>: {escape(shown)}</li>"
                    if name
                    else f"<li>{escape(shown)}</li>"
                )
    return total


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
