"""What is published to ntfy (https://docs.ntfy.sh/publish): JSON, or a text with its options in headers."""

from collections.abc import Mapping, Sequence
from email.header import decode_header, make_header
from typing import Any

from flowbridge.sources import parts
from flowbridge.sources.emoji import emoji
from flowbridge.sources.parts import Parts
from flowbridge.sources.reading import items, objects, text
from flowbridge.sources.source import Headers, Incoming, Notice, Source, UnrecognisedError

_PRIORITIES = {"4": "high", "high": "high", "5": "urgent", "max": "urgent", "urgent": "urgent"}
_KEYS = frozenset(
    (
        *(
            "topic",
            "message",
            "title",
            "tags",
            "priority",
            "actions",
            "click",
            "attach",
            "markdown",
            "icon",
            "filename",
        ),
        *("delay", "email", "call", "cache", "firebase", "sequence_id", "id", "time", "event", "expires", "attachment"),
    )
)
_HEADERS = {
    "title": ("x-title", "title", "ti", "t"),
    "message": ("x-message", "message", "m"),
    "tags": ("x-tags", "tags", "tag", "ta"),
    "priority": ("x-priority", "priority", "prio", "p"),
    "click": ("x-click", "click"),
    "attach": ("x-attach", "attach", "a"),
    "filename": ("x-filename", "filename", "file", "f"),
    "markdown": ("x-markdown", "markdown", "md"),
}


def read(incoming: Incoming) -> Sequence[Notice]:
    payload, headers = incoming.payload, incoming.headers
    given: dict[str, Any] = _options(headers)
    if isinstance(payload, str):
        given.setdefault("message", payload)
    elif isinstance(payload, dict):
        given |= {name: value for name, value in payload.items() if value is not None}
    tags = given.get("tags")
    names = tags.split(",") if isinstance(tags, str) else [text(each) for each in items({"tags": tags}, "tags")]
    names = [name.strip() for name in names[:20] if name.strip()]
    icons = "".join(map(emoji, names))
    said = Parts()
    title, message = text(given, "title").strip(), text(given, "message").strip()
    is_markdown = text(given, "markdown").lower() in ("true", "1", "yes") or _is_markdown(headers)
    said.title(f"{icons} {title}" if title else "", text(given, "click"))
    if message:
        message = message if title or not icons else f"{icons} {message}"
        (said.markdown if is_markdown else said.text)(message)
    if not said.found and not text(given, "attach"):
        raise UnrecognisedError("has nothing to show: it needs a message or a title")
    facts = [("Priority", _PRIORITIES.get(text(given, "priority").lower(), ""))]
    facts.append(("Tags", ", ".join(name for name in names if not emoji(name))))
    said.facts((name, value) for name, value in facts if value)
    said.links(_links(given, title))
    return [Notice(view={"parts": said.found})]


def _links(given: Mapping[str, Any], title: str) -> list[tuple[str, str]]:
    found = [] if title else [("Open", text(given, "click"))]
    attached = given.get("attach")
    if isinstance(attached, str):
        found.append((text(given, "filename") or attached, attached))
    attachment = given.get("attachment")  # what ntfy itself says of a message that it has
    found.append((text(attachment, "name"), text(attachment, "url")))
    return found + [(text(each, "label"), text(each, "url")) for each in objects(given, "actions") if _opens(each)]


def _opens(action: Mapping[str, Any]) -> bool:
    return text(action, "action") in ("view", "")


def _options(headers: Headers) -> dict[str, Any]:
    """What stands in headers; RFC 2047 for what is not ASCII."""
    found = {}
    for name, aliases in _HEADERS.items():
        for alias in aliases:
            if value := headers.get(alias):
                found[name] = _decoded(value)
                break
    return found


def _decoded(value: str) -> str:
    if not value.isascii():  # UTF-8, which HTTP reads as Latin-1
        try:
            return value.encode("latin-1").decode()
        except ValueError:
            return value
    if "=?" not in value:
        return value
    try:
        return str(make_header(decode_header(value[:4_000])))
    except (ValueError, LookupError):
        return value


def _is_markdown(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("text/markdown")


def _recognises(headers: Headers, payload: Any) -> bool:
    if isinstance(payload, dict):
        # Of `topic` and `message` alone, an MQTT bridge's topic says what it is about.
        return "topic" in payload and payload.keys() <= _KEYS and len(payload.keys() - {"topic", "message"}) > 0
    return isinstance(payload, str) and any(f"x-{name}" in headers for name in ("title", "tags", "priority", "click"))


SOURCE = Source(
    "ntfy",
    "ntfy",
    _recognises,
    read,
    template=parts.TEMPLATE,
    dialect=True,
    sample={
        "topic": "backups",
        "title": "Backup failed",
        "message": "db-1 has not been saved since yesterday",
        "tags": ["warning", "db-1"],
        "priority": 4,
        "click": "https://wiki.example.org/backup",
    },
)
