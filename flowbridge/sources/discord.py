"""Discord's webhooks (https://docs.discord.com/developers/resources/webhook#execute-webhook): Markdown, and embeds."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from flowbridge.sources import parts, slack
from flowbridge.sources.emoji import with_emoji
from flowbridge.sources.parts import Parts
from flowbridge.sources.reading import at, items, moment, objects, text
from flowbridge.sources.source import Headers, Incoming, Notice, Source, UnrecognisedError

MAX_EMBEDS = 10  # as Discord itself takes

_KEYS = frozenset(
    (
        *("content", "username", "avatar_url", "tts", "embeds", "allowed_mentions", "allow_mentions", "components"),
        *("files", "payload_json", "attachments", "flags", "thread_name", "thread_id", "applied_tags", "poll", "wait"),
    )
)
_EVERYBODY = re.compile(r"(?<!\w)@(?:everyone|here)(?!\w)")
_AFTER_A_LIST = re.compile(r"^([*+-] .*)\n(?=[^\s*+\-\d#>|`~])", re.MULTILINE)
_SPECIAL = re.compile(
    r"<(?:a?:(?P<emoji>\w{1,40}):\d{1,25}|(?P<who>@!?|@&|#)(?P<id>\d{1,25})|t:(?P<time>-?\d{1,12})(?::[a-zA-Z])?)>"
)


def read(incoming: Incoming) -> Sequence[Notice]:
    payload = incoming.payload
    if isinstance(payload, str):
        payload = {"content": payload}
    elif slack.is_shaped(payload) and not at(payload, "embeds"):
        return slack.read(incoming)  # Discord takes Slack's shape, too, at a path that ends in /slack
    said = Parts()
    said.markdown(_plain(text(payload, "content")))
    for embed, _ in zip(objects(payload, "embeds"), range(MAX_EMBEDS), strict=False):
        _add(said, embed)
    if not said.found:
        raise UnrecognisedError("has nothing to show: it needs content, or embeds that hold a text")
    view = {"username": text(payload, "username").strip()[:100], "parts": said.found}
    return [Notice(view=view, message={"mentions": ["@room"]} if _mentions_room(payload) else None)]


def _mentions_room(payload: Any) -> bool:
    """In `content` alone, and only if `allowed_mentions`, where there are any, have it."""
    allowed = at(payload, "allowed_mentions")
    is_allowed = not isinstance(allowed, dict) or "everyone" in items(allowed, "parse")
    return is_allowed and bool(_EVERYBODY.search(text(payload, "content")[: parts.MAX_CHARACTERS]))


def _add(said: Parts, embed: Mapping[str, Any]) -> None:
    if author := text(embed, "author", "name"):
        said.links([(author, url)]) if (url := text(embed, "author", "url")) else said.text(author)
    said.title(_plain(text(embed, "title")), text(embed, "url"))
    if not text(embed, "title"):
        said.links([("", text(embed, "url"))])
    said.markdown(_plain(text(embed, "description")))
    said.facts((_plain(text(field, "name")), _plain(text(field, "value"))) for field in objects(embed, "fields"))
    said.links([("image", text(embed, "image", "url"))])
    said.text(" · ".join(filter(None, (text(embed, "footer", "text"), _when(at(embed, "timestamp"))))))


def _plain(said: str) -> str:
    """Discord's own marks as texts, since its ids mean nothing elsewhere. The line below a list is not of the list."""
    shown = with_emoji(_SPECIAL.sub(_special, said[: parts.MAX_CHARACTERS]))
    return _AFTER_A_LIST.sub(r"\1\n\n", shown)


def _special(found: re.Match[str]) -> str:
    if found["emoji"]:
        return f":{found['emoji']}:"
    if found["time"]:
        return _when(int(found["time"])) or found[0]
    return f"{found['who'][0]}{found['id']}"


def _when(value: Any) -> str:
    moment_ = moment(value)
    return f"{datetime.fromtimestamp(moment_ / 1000, UTC):%Y-%m-%d %H:%M} UTC" if moment_ else ""


def _recognises(headers: Headers, payload: Any) -> bool:
    if not isinstance(payload, dict):
        return False
    has_embeds = any(True for _ in objects(payload, "embeds"))
    return has_embeds or (isinstance(payload.get("content"), str) and payload.keys() <= _KEYS)


SOURCE = Source(
    "discord",
    "Discord",
    _recognises,
    read,
    template=parts.TEMPLATE,
    dialect=True,
    sample={
        "username": "Backups",
        "content": "Backup of **db-1** failed",
        "embeds": [
            {
                "title": "What to do",
                "url": "https://wiki.example.org/backup",
                "fields": [{"name": "Host", "value": "db-1", "inline": True}],
            }
        ],
    },
)
