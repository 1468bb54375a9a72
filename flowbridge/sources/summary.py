"""Any JSON, as a person can read it: what is sent where there is no template, or it fails. Pure.

What it is about comes first: a title, its state, a link. The other values follow, those near the root and short ones
first; ids and hashes only where there is little else. Linear in the body: a megabyte of 100,000 keys takes 40 ms.
"""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import islice
from typing import Any

from flowbridge.sources.reading import moment

MAX_ROWS = 30
MAX_FACTS = 6  # in a row
MAX_VALUE = 300  # characters
MAX_LINES = 5  # of one of several values
MAX_TITLE = 200
ENOUGH = 8  # rows beside which ids and hashes are left out
MASK = "•••"

_MAX_LEAVES = 600  # that are looked at
_SECRET = re.compile(
    r"pass(?!ed|ing|es|age|enger|ive)|token|secret|authorization|cookie|^headers$|api[_-]?key|private[_-]?key|credential",
    re.IGNORECASE,
)
_IN_TEXT = (
    (re.compile(r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@:]{0,200}:[^\s/@]{1,200}@"), rf"\1{MASK}@"),
    (
        re.compile(
            r"(?i)([?&;#](?:[a-z0-9_-]{0,30}(?:token|secret|passw|password|signature|api[_-]?key)|key|sig|auth|code|jwt)=)"
            r"[^&\s#\"'<>]+"
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[a-z0-9._~+/=-]{8,}"), rf"\1 {MASK}"),
    (
        re.compile(
            r"(?i)(\"[a-z0-9_-]{0,30}(?:passw|password|token|secret|api[_-]?key)[a-z0-9_-]{0,30}\"\s*:\s*\")[^\"]*"
        ),
        rf"\1{MASK}",
    ),
)
# In the order in which they are asked: what says most of what has happened comes first.
_TITLES = (
    *("title", "subject", "headline", "summary", "message", "msg", "alertname", "alert_name", "trigger", "text"),
    "description",
    *(_NAMES := ("full_name", "repo_full_name", "repo_name", "display_name", "name")),
    "reason",
)
_EVENTS = ("event", "event_type", "eventtype", "event_name", "action")
_KINDS = (*_EVENTS, "type", "kind")
_STATES = ("status", "state", "severity", "level", "status_message", "result", "conclusion", "outcome", "impact")
_LINKS = (
    "url",
    "link",
    "html_url",
    "web_url",
    "permalink",
    "href",
    "shortlink",
    "external_url",
    "build_url",
    "details_url",
)
_NO_LINK = re.compile(r"callback|unsubscribe|avatar|icon|image|logo|api|hook|documentation", re.IGNORECASE)
_NOISE = re.compile(
    r"(?:^|[_.-])(?:u?uid|guid|id|digest|sha\d*|hash|checksum|fingerprint|etag|api_?version|schema)$"
    r"|[a-z](?:Id|UUID|Uuid|Hash|Digest)$",
)
_LINK = re.compile(r"https?://[^\s/<>\"]+[^\s<>\"]*", re.IGNORECASE)
_HASH = re.compile(r"(?:[a-z0-9]+:)?[0-9a-fA-F-]{24,}")
_TIME = re.compile(
    r"(?:^|[_.-])(?:at|on|time|timestamp|date|created|updated|started|ended|start|end|occur_at)$|[a-z](?:At|Time|Date)$"
)
_WORDS = re.compile(r"[a-z][A-Za-z0-9_]*")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}\S{0,20}")


@dataclass(slots=True)
class _Leaf:
    """A value that is neither an object nor a list of any. `shown`: as a person reads it."""

    path: tuple[str, ...]
    value: Any
    shown: str

    @property
    def key(self) -> str:
        return self.path[-1] if self.path else ""


def summary(value: Any, title: str = "") -> str:
    """HTML: what the value is about, and a list of what else it holds, without secrets."""
    leaves, others = _leaves(value)
    if not leaves:
        return f"{_strong(title)}<p>An empty request.</p>"
    if not isinstance(value, dict | list):
        return f"{_strong(title)}<p>{_lined(leaves[0].shown)}</p>"
    head, used = _head(leaves)
    rows, dropped = _rows([leaf for leaf in leaves if id(leaf) not in used])
    more = f"<li>… and {dropped + others} more</li>" if dropped + others and rows else ""
    listed = f"<ul>{''.join(rows)}{more}</ul>" if rows else ""
    return f"{_strong(title)}{head}{listed}"


def is_secret(name: str) -> bool:
    return bool(_SECRET.search(name))


def _leaves(root: Any) -> tuple[list[_Leaf], int]:
    """Those near the root first; and how many more there are."""
    found: list[_Leaf] = []
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), root)])
    is_whole = True
    while waiting:
        if len(found) == _MAX_LEAVES:
            is_whole = False
            break
        path, value = waiting.popleft()
        if path and is_secret(path[-1]) and value not in (None, "", True, False, [], {}):
            found.append(_Leaf(path, MASK, MASK))
        elif isinstance(value, dict):
            waiting.extend(((*path, str(key)), item) for key, item in islice(value.items(), _MAX_LEAVES))
            is_whole = is_whole and len(value) <= _MAX_LEAVES
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value[:_MAX_LEAVES]):
            numbers = len(value) > 1
            items = enumerate(value[:_MAX_LEAVES], 1)
            waiting.extend(((*path, str(number)) if numbers else path, item) for number, item in items)
            is_whole = is_whole and len(value) <= _MAX_LEAVES
        elif shown := _shown(path[-1] if path else "", value):
            found.append(_Leaf(path, value, shown))
    return found, 0 if is_whole else max(0, _count(root) - len(found))


def _count(root: Any) -> int:
    """Of values that are neither objects nor lists, nor empty."""
    count, waiting = 0, [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif value is not None and value != "":
            count += 1
    return count


def _shown(key: str, value: Any) -> str:
    """A value as a person reads it; "" where there is none."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        first = [_shown("", item) for item in value[:10]]
        return ", ".join(filter(None, first)) + (f" … and {len(value) - 10} more" if len(value) > 10 else "")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int | float):
        is_time = 1e9 <= value < 1e13 and bool(_TIME.search(key))
        return _date(value) if is_time else str(value)
    text = str(value)[: 4 * MAX_VALUE].strip()
    if _ISO.fullmatch(text) and (date := _date(text)):
        return date
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def _date(value: Any) -> str:
    at = moment(value)
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M} UTC" if at else str(value)


def _head(leaves: list[_Leaf]) -> tuple[str, set[int]]:
    """What has happened, in a line or two of HTML, and the leaves that it is made of."""
    named = _first(leaves, _TITLES, lambda leaf: isinstance(leaf.value, str) and not _is_noise(leaf))
    kind = _first(
        leaves, _KINDS, lambda leaf: len(leaf.path) == 1 and isinstance(leaf.value, str) and len(leaf.shown) <= 60
    )
    states = [
        leaf
        for leaf in leaves
        if leaf.key.lower() in _STATES
        and len(leaf.path) <= 2
        and leaf is not named
        and leaf is not kind
        and _is_word(leaf)
    ][:2]
    links = [
        leaf
        for leaf in leaves
        if len(leaf.path) <= 2 and _is_link(leaf.value) and not _NO_LINK.search(".".join(leaf.path))
    ]
    # That of the object that has the state, or the title; an account, or a project, has one, too.
    parents = [leaf.path[:-1] for leaf in (*states, named) if leaf is not None]
    beside = (_first([leaf for leaf in links if leaf.path[:-1] == parent], _LINKS) for parent in parents)
    link = next(filter(None, beside), None) or _first(links, _LINKS)
    if named and kind:
        is_event = kind.key.lower() in _EVENTS or named.key.lower() in _NAMES
        if not is_event or kind.shown.lower() in named.shown.lower():
            kind = None
    title = named or kind
    if title is None:
        return "", set()
    used = {id(leaf) for leaf in (title, link, *states) if leaf is not None}
    prefix = ""
    if kind is not None and kind is not title:
        used.add(id(kind))
        prefix = f"{escape(_words(kind.shown))}: "
    first, _, rest = title.shown.partition("\n")
    shown = f"{prefix}{escape(_cut(first, MAX_TITLE))}"
    if link is not None:
        shown = f'<a href="{escape(link.shown)}">{shown}</a>'
    state = " · ".join(dict.fromkeys(escape(leaf.shown) for leaf in states))
    more = f"<p>{_lined(_cut(rest.strip(), MAX_VALUE))}</p>" if rest.strip() else ""
    return f"<p><strong>{shown}</strong>{f' — {state}' if state else ''}</p>{more}", used


def _any(leaf: _Leaf) -> bool:
    return True


def _first(leaves: list[_Leaf], keys: tuple[str, ...], fits: Callable[[_Leaf], bool] = _any) -> _Leaf | None:
    """Of the first of these keys that there is, at the root before elsewhere."""
    by_key: dict[str, _Leaf] = {}
    for leaf in leaves:
        if len(leaf.path) <= 3 and leaf.value is not MASK and (key := leaf.key.lower()) not in by_key and fits(leaf):
            by_key[key] = leaf
    near = {key: leaf for key, leaf in by_key.items() if len(leaf.path) == 1}
    return next((found[key] for found in (near, by_key) for key in keys if key in found), None)


def _rows(leaves: list[_Leaf]) -> tuple[list[str], int]:
    """Items of a list, one for what is in the same object; and how many values more there would be."""
    said: set[tuple[str, str]] = set()
    facts: list[_Leaf] = []
    noise: list[_Leaf] = []
    for leaf in leaves:
        if (leaf.key, leaf.shown) not in said:
            if len(leaf.shown) > 20:  # the same short one may be said of several things
                said.add((leaf.key, leaf.shown))
            (noise if _is_noise(leaf) else facts).append(leaf)
    facts.sort(key=_is_long)  # stable: the others keep their order
    chosen = facts + noise[: max(0, ENOUGH - len(facts))]
    rows: dict[tuple[str, ...], list[str]] = {}
    count = 0
    for leaf in chosen:
        at = leaf.path if len(leaf.path) < 2 or _is_long(leaf) else leaf.path[:-1]
        while len(rows.get(at, ())) == MAX_FACTS:
            at = (*at, "")
        if at not in rows and len(rows) == MAX_ROWS:
            continue
        value = _lined(_few_lines(_cut(leaf.shown, MAX_VALUE)))
        is_alone = at == leaf.path
        rows.setdefault(at, []).append(value if is_alone else f"{escape(_words(leaf.key))}: {value}")
        count += 1
    return [_row(path, values) for path, values in rows.items()], len(facts) + len(noise) - count


def _row(path: tuple[str, ...], values: list[str]) -> str:
    name = escape(" ".join(_words(part) for part in [part for part in path if part][-2:]))
    return f"<li><strong>{name}</strong>: {' · '.join(values)}</li>" if name else f"<li>{' · '.join(values)}</li>"


def _is_long(leaf: _Leaf) -> bool:
    return len(leaf.shown) > 100 or "\n" in leaf.shown


def _words(name: str) -> str:
    """`scan_status` and `scanStatus` as `scan status`; what is no such name stays as it is."""
    name = _cut(name, 60)
    return _CAMEL.sub(" ", name).replace("_", " ").lower().strip() if _WORDS.fullmatch(name) else name


def _is_noise(leaf: _Leaf) -> bool:
    """What people do not read: ids, hashes, JSON inside of a text, addresses for programs, a `false` of an object."""
    value = leaf.value
    if not isinstance(value, str):
        return bool(_NOISE.search(leaf.key)) or (len(leaf.path) > 1 and value is False)
    is_json = value[:1] in ("{", "[") and value[-1:] in ("}", "]")
    is_for_programs = _is_link(value) and ("{" in value or bool(_NO_LINK.search(leaf.key)) or "//api." in value)
    return is_json or is_for_programs or bool(_NOISE.search(leaf.key)) or bool(_HASH.fullmatch(value))


def _is_word(leaf: _Leaf) -> bool:
    return isinstance(leaf.value, str) and len(leaf.value) <= 40 and not leaf.value.isdigit()


def _is_link(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1_000 and bool(_LINK.fullmatch(value))


def _lined(text: str) -> str:
    return escape(text, quote=False).replace("\r\n", "\n").replace("\n", "<br>")


def _few_lines(text: str) -> str:
    """A Dockerfile, or a page of HTML, is not what a room is to read."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines) if len(lines) <= MAX_LINES else "\n".join([*lines[:MAX_LINES], "…"])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _strong(title: str) -> str:
    return f"<p><strong>{escape(title, quote=False)}</strong></p>" if title else ""
