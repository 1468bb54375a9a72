"""From a message as people write it to the events that a room holds. Pure: Markdown and HTML come rendered."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from flowbridge.events.message import Attachment, Message, Reaction, Redaction
from flowbridge.events.relations import NONE, Binding, Content, Found, bind
from flowbridge.models import Rendered
from flowbridge.rendering.pills import with_pills

MESSAGE, REACTION, REDACTION = "m.room.message", "m.reaction", "m.room.redaction"
CUT_BYTES = 4_096  # of a text that is too long, beside the file that holds all of it
CUT = "… (cut here: the file below has all of it)"

_KINDS = {"image": "m.image", "audio": "m.audio", "video": "m.video"}
_BLOCKS = ("<p", "<h1", "<h2", "<h3", "<h4", "<h5", "<h6", "<ul", "<ol", "<pre", "<blockquote", "<table", "<div", "<hr")


@dataclass(frozen=True, slots=True)
class Shaped:
    """One event: its content, and the relations that it is yet to get."""

    type: str
    content: Content
    binding: Binding = NONE

    @property
    def bound(self) -> "Shaped":
        """With the relations that need no look-up: those to events that are named by their ids."""
        if self.binding is NONE or self.binding.is_open:
            return self
        content = bind(self.content, self.binding, lambda target: Found(target.name)).content
        return replace(self, content=content, binding=NONE)


def shape(message: Message, rendered: Rendered | None = None) -> list[Shaped]:
    """The events of a message, in their order. `rendered`: its text, if that is Markdown or HTML."""
    events: list[Shaped] = []
    if message.source:
        text = rendered or Rendered(message.source)
        events.append(Shaped(MESSAGE, _text(message, text), message.binding))
    for attachment in message.attachments:
        binding = message.later_binding if events else message.binding
        events.append(Shaped(MESSAGE, file(attachment), binding))
    return [event.bound for event in events]


def react(reaction: Reaction) -> Shaped:
    content = {"m.relates_to": {"rel_type": "m.annotation", "key": reaction.key}}
    return Shaped(REACTION, content, Binding(reacts=reaction.target)).bound


def redact(redaction: Redaction) -> Shaped:
    content: Content = {"reason": redaction.reason} if redaction.reason else {}
    return Shaped(REDACTION, content, Binding(redacts=redaction.target)).bound


def _text(message: Message, text: Rendered) -> Content:
    body, html = text.body, text.html
    if html is None and (message.title or (message.users and any(user in body for user in message.users))):
        html = with_pills(escape(body, quote=False).replace("\n", "<br>"), message.users)
    if message.title:
        body = f"{message.title}\n{body}"
        title = f"<strong>{escape(message.title, quote=False)}</strong>"
        html = f"<p>{title}</p>{html}" if (html or "").startswith(_BLOCKS) else f"{title}<br>{html}"
    content: Content = {"msgtype": message.msgtype, "body": body}
    if html is not None:
        content |= {"format": "org.matrix.custom.html", "formatted_body": html}
    content["m.mentions"] = _mentions(message)  # always: else clients ping everybody whose name is in the text
    return content


def _mentions(message: Message) -> Content:
    found: Content = {}
    if message.users:
        found["user_ids"] = list(message.users)
    if message.mentions_room:
        found["room"] = True
    return found


def file(attachment: Attachment) -> Content:
    """The content for a file: an image, audio, a video, or any other file, by its media type."""
    info: Mapping[str, Any] = {"mimetype": attachment.mimetype, **(attachment.info or {})}
    place = {"url": attachment.content_uri} if attachment.file is None else {"file": attachment.file}
    return {
        "msgtype": _KINDS.get(attachment.mimetype.partition("/")[0], "m.file"),
        "body": attachment.caption or attachment.filename,
        "filename": attachment.filename,
        **place,
        "info": info,
        "m.mentions": {},
    }


def with_content(event: Shaped, content: Content) -> Shaped:
    """The event with another content, which has the same relations."""
    kept = {name: value for name, value in event.content.items() if name == "m.relates_to"}
    return replace(event, content={**content, **kept})


def cut(message: Message) -> Message:
    """The beginning of a text that is too long, up to the end of a line where there is one."""
    start = message.source.encode()[:CUT_BYTES].decode("utf-8", "ignore")
    line = start.rfind("\n")
    start = start[:line] if line > CUT_BYTES // 2 else start
    gap = {"text": "\n", "markdown": "\n\n", "html": "<br>"}[message.format]
    return replace(message, source=f"{start}{gap}{CUT}")
