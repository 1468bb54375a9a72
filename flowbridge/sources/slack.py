"""Slack's incoming webhooks, which Mattermost, Rocket.Chat and Google Chat take, too, and hundreds of tools send.

With blocks, `text` is only their summary, and is not shown; attachments are shown beside either
(https://docs.slack.dev/reference/block-kit/blocks, https://docs.slack.dev/legacy/legacy-messaging/legacy-secondary-message-attachments).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flowbridge.sources import google_chat
from flowbridge.sources.emoji import emoji
from flowbridge.sources.mrkdwn import Mrkdwn, joined, link
from flowbridge.sources.reading import items, mapping, moment, objects, text
from flowbridge.sources.source import Headers, Incoming, Notice, Source, UnrecognisedError

MAX_PARTS = 100  # blocks, attachments, fields …: Slack takes 50 or 100 of each

_LABELLED = re.compile(r"<p><strong>([^\n]+?):?</strong>:?(?:<br>|\s+)(.+)</p>", re.DOTALL)
_MARKED = re.compile(r"<(?:https?://[^<>|\s]{1,2000}\|[^<>|]+|!(?:here|channel|everyone)(?:\|[^<>]*)?)>")
_OF_A_MESSAGE = ("icon_emoji", "icon_url", "cardsV2")
_OF_AN_ATTACHMENT = (
    "fallback",
    "pretext",
    "author_name",
    "title_link",
    "fields",
    "color",
    "blocks",
    "mrkdwn_in",
    "footer",
)
_STYLES = (("bold", "strong"), ("italic", "em"), ("strike", "del"), ("code", "code"))


def read(incoming: Incoming) -> Sequence[Notice]:
    payload = incoming.payload
    if isinstance(payload, str):
        payload = {"text": payload}
    reader = _Reader()
    blocks = reader.message(payload) or google_chat.blocks(payload)
    if not blocks:
        raise UnrecognisedError("has nothing to show: it needs text, blocks or attachments that hold a text")
    html = joined(blocks)
    if name := sender(payload):
        html = (
            f"<p><strong>{name}</strong></p>\n{html}"
            if html.startswith("<") and len(blocks) > 1
            else f"<strong>{name}:</strong> {html}"
        )
    message: dict[str, Any] = {"html": html}
    if reader.mrkdwn.mentions_room:
        message |= {"mentions": ["@room"]}
    return [Notice(view={"html": html, "username": text(payload, "username")}, message=message)]


def sender(payload: Any) -> str:
    """Who speaks, with the emoji that stands for a picture of it; as HTML."""
    icon = emoji(text(payload, "icon_emoji").strip(":"))
    return escape(" ".join(filter(None, (icon, text(payload, "username").strip()[:100]))), quote=False)


def is_shaped(payload: Any) -> bool:
    """Whether a body can be nothing else."""
    if not isinstance(payload, dict):
        return False
    attachments = list(objects(payload, "attachments"))
    return (
        any(text(block, "type") for block in objects(payload, "blocks"))
        or any(name in each for each in attachments for name in _OF_AN_ATTACHMENT)
        or any(
            "text" in each and not any(name in each for name in ("url", "data", "content_uri")) for each in attachments
        )
        or (_is_text(payload) and any(name in payload for name in _OF_A_MESSAGE))
        or (not any(name in payload for name in ("markdown", "html", "format")) and _is_mrkdwn(text(payload, "text")))
        or bool(items(payload, "cardsV2"))
    )


def _is_text(payload: Mapping[str, Any]) -> bool:
    return isinstance(payload.get("text"), str)


def _is_mrkdwn(said: str) -> bool:
    """`<https://…|text>` and `<!here>` are nothing else."""
    return bool(_MARKED.search(said[:10_000]))


class _Reader:
    """Reads the parts of one message as blocks of HTML."""

    def __init__(self) -> None:
        self.mrkdwn = Mrkdwn()

    def message(self, payload: Any) -> list[str]:
        found = self.blocks(objects(payload, "blocks"))
        said = text(payload, "text")
        if not found and said.strip():
            found = (
                [f"<p>{self.mrkdwn.plain(said)}</p>"]
                if mapping(payload).get("mrkdwn") is False
                else self.mrkdwn.blocks(said)
            )
        for attachment in _first(objects(payload, "attachments")):
            found += self._attachment(attachment)
        return found

    def blocks(self, blocks: Iterable[Mapping[str, Any]]) -> list[str]:
        found: list[str] = []
        for block in _first(blocks):
            read = _BLOCKS.get(text(block, "type"), _Reader._other)
            found += [each for each in read(self, block) if each]
        kept = [each for index, each in enumerate(found) if each != "<hr>" or found[index - 1 : index] != ["<hr>"]]
        while kept and kept[-1] == "<hr>":
            kept.pop()
        return kept[1:] if kept[:1] == ["<hr>"] else kept

    def _text(self, value: Any) -> list[str]:
        """Of a text object: {"type": "mrkdwn" or "plain_text", "text"}; some send a string."""
        said = value if isinstance(value, str) else text(value, "text")
        if not said.strip():
            return []
        if text(value, "type") == "plain_text":
            return [f"<p>{self.mrkdwn.plain(said)}</p>"]
        return self.mrkdwn.blocks(said)

    def _line(self, value: Any) -> str:
        said = value if isinstance(value, str) else text(value, "text")
        return self.mrkdwn.plain(said) if text(value, "type") == "plain_text" else self.mrkdwn.line(said)

    def _header(self, block: Mapping[str, Any]) -> list[str]:
        return [_strong(self._line(block.get("text")))]

    def _section(self, block: Mapping[str, Any]) -> list[str]:
        found = self._text(block.get("text"))
        fields = [_labelled(self._text(each)) for each in _first(items(block, "fields"))]
        found += _list(fields)
        accessory = mapping(block, "accessory")
        return [*found, _paragraph(self._picture(accessory) or self._button(accessory))]

    def _context(self, block: Mapping[str, Any]) -> list[str]:
        parts: list[list[str]] = []
        for element in _first(objects(block, "elements")):
            picture = self._picture(element)
            parts.append([f"<p>{picture}</p>"] if picture else self._text(element))
        lines: list[str] = []
        others: list[str] = []
        for part in parts:
            if others or len(part) != 1 or not part[0].startswith("<p>"):
                others += part
            else:
                lines.append(joined(part))
        return [_paragraph(" · ".join(lines)), *others]

    def _image(self, block: Mapping[str, Any]) -> list[str]:
        return [_paragraph(self._picture({**block, "type": "image"}))]

    def _actions(self, block: Mapping[str, Any]) -> list[str]:
        return [_paragraph(" · ".join(filter(None, map(self._button, _first(objects(block, "elements"))))))]

    def _input(self, block: Mapping[str, Any]) -> list[str]:
        return self._text(block.get("label"))

    def _divider(self, block: Mapping[str, Any]) -> list[str]:
        return ["<hr>"]

    def _video(self, block: Mapping[str, Any]) -> list[str]:
        title = link(text(block, "title_url") or text(block, "video_url"), self._name(block.get("title")) or "video")
        return [_paragraph(title), *self._text(block.get("description"))]

    def _table(self, block: Mapping[str, Any]) -> list[str]:
        rows = []
        for row in _first(items(block, "rows")):
            cells = row if isinstance(row, list) else []
            shown = [
                " ".join(self.blocks([cell])) if items(cell, "elements") else self._line(cell) for cell in cells[:20]
            ]
            rows.append("".join(f"<td>{cell.replace('<p>', '').replace('</p>', '')}</td>" for cell in shown))
        return [f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"] if any(rows) else []

    def _other(self, block: Mapping[str, Any]) -> list[str]:
        """What is newer than this, and holds a text."""
        return [*self._text(block.get("title")), *self._text(block.get("text"))]

    def _name(self, value: Any) -> str:
        return value if isinstance(value, str) else text(value, "text")

    def _picture(self, element: Mapping[str, Any]) -> str:
        if text(element, "type") != "image":
            return ""
        name = self._name(element.get("title")) or text(element, "alt_text") or "image"
        return link(text(element, "image_url") or text(element, "slack_file", "url"), name[:200])

    def _button(self, element: Mapping[str, Any]) -> str:
        url = text(element, "url")
        return link(url, self._name(element.get("text"))[:200] or url) if url else ""

    def _rich_text(self, block: Mapping[str, Any]) -> list[str]:
        found: list[str] = []
        for element in _first(objects(block, "elements")):
            kind = text(element, "type")
            if kind == "rich_text_list":
                items_ = [self._rich_line(each) for each in _first(objects(element, "elements"))]
                tag = "ol" if text(element, "style") == "ordered" else "ul"
                found.append(_list(items_, tag)[0] if any(items_) else "")
            elif kind == "rich_text_preformatted":
                code = "".join(text(each, "text") or text(each, "url") for each in _first(objects(element, "elements")))
                found.append(f"<pre><code>{escape(code[:10_000], quote=False)}</code></pre>" if code.strip() else "")
            elif line := self._rich_line(element):
                found.append(f"<blockquote>{line}</blockquote>" if kind == "rich_text_quote" else f"<p>{line}</p>")
        return found

    def _rich_line(self, element: Mapping[str, Any]) -> str:
        return "".join(map(self._rich, _first(objects(element, "elements")))).strip("\n").replace("\n", "<br>")

    def _rich(self, element: Mapping[str, Any]) -> str:
        kind, said = text(element, "type"), text(element, "text")[:10_000]
        if kind == "link":
            shown = link(_escaped(text(element, "url")), _escaped(said or text(element, "url")))
        elif kind == "emoji":
            shown = emoji(text(element, "name")) or escape(f":{text(element, 'name')}:", quote=False)
        elif kind == "broadcast":
            self.mrkdwn.mentions_room = True
            shown = escape(f"@{text(element, 'range') or 'channel'}", quote=False)
        elif kind in ("user", "usergroup"):
            shown = escape(f"@{text(element, f'{kind}_id')}", quote=False)
        elif kind == "channel":
            shown = escape(f"#{text(element, 'channel_id')}", quote=False)
        elif kind == "date":
            shown = escape(text(element, "fallback") or when(element.get("timestamp")), quote=False)
        else:
            shown = escape(said or text(element, "value"), quote=False)
        style = mapping(element, "style")
        for name, tag in _STYLES:
            if style.get(name) is True and shown.strip():
                shown = f"<{tag}>{shown}</{tag}>"
        return shown

    def _attachment(self, attachment: Mapping[str, Any]) -> list[str]:
        found = self._text(attachment.get("pretext"))
        author = link(text(attachment, "author_link"), text(attachment, "author_name")[:200])
        title = self.mrkdwn.line(text(attachment, "title")[:1_000])
        if title and (url := text(attachment, "title_link")):
            title = link(url, text(attachment, "title")[:1_000])
        found += [_paragraph(author), _strong(title)]
        found += self._text(attachment.get("text"))
        found += self._fields(attachment)
        found += self.blocks(objects(attachment, "blocks"))
        if url := text(attachment, "image_url"):
            found.append(_paragraph(link(url, "image")))
        found += self._actions({"elements": items(attachment, "actions")})
        if any(found):
            footer = (self.mrkdwn.line(text(attachment, "footer")[:1_000]), when(attachment.get("ts")))
            found.append(_paragraph(" · ".join(filter(None, footer))))
        else:
            found = self._text(attachment.get("fallback"))
        return [each for each in found if each]

    def _fields(self, attachment: Mapping[str, Any]) -> list[str]:
        found = []
        for each in _first(objects(attachment, "fields")):
            name = self.mrkdwn.line(text(each, "title")[:1_000]).rstrip(": ")
            value = joined(self._text(text(each, "value")))
            found.append(
                f"<strong>{name}</strong>: {value}" if name and value else f"<strong>{name}</strong>" if name else value
            )
        return _list(found)


_BLOCKS: Mapping[str, Callable[[_Reader, Mapping[str, Any]], list[str]]] = {
    "header": _Reader._header,
    "section": _Reader._section,
    "context": _Reader._context,
    "divider": _Reader._divider,
    "image": _Reader._image,
    "actions": _Reader._actions,
    "input": _Reader._input,
    "rich_text": _Reader._rich_text,
    "video": _Reader._video,
    "table": _Reader._table,
}


def when(value: Any) -> str:
    """Slack writes seconds as numbers and as texts."""
    from datetime import UTC, datetime

    try:
        at = moment(float(value) if isinstance(value, str) else value)
    except ValueError:
        return ""
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M} UTC" if at else ""


def _first(values: Iterable[Any]) -> list[Any]:
    return [value for value, _ in zip(values, range(MAX_PARTS), strict=False)]


def _labelled(blocks: list[str]) -> str:
    """`*Label*` over a value, as fields mostly are, in one line."""
    html = "\n".join(blocks)
    if found := _LABELLED.fullmatch(html):
        return f"<strong>{found[1]}</strong>: {found[2]}"
    return joined(blocks)


def _list(entries: Sequence[str], tag: str = "ul") -> list[str]:
    shown = "".join(f"<li>{each}</li>" for each in entries if each)
    return [f"<{tag}>{shown}</{tag}>"] if shown else []


def _paragraph(html: str) -> str:
    return f"<p>{html}</p>" if html else ""


def _strong(html: str) -> str:
    return f"<p><strong>{html}</strong></p>" if html else ""


def _escaped(said: str) -> str:
    return said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _recognises(headers: Headers, payload: Any) -> bool:
    return is_shaped(payload)


SOURCE = Source(
    "slack",
    "Slack",
    _recognises,
    read,
    dialect=True,
    sample={
        "username": "Backups",
        "icon_emoji": ":floppy_disk:",
        "text": "Backup of *db-1* failed: <https://wiki.example.org/backup|what to do>",
    },
)
