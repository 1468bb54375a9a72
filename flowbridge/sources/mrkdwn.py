"""Slack's text, mrkdwn, as HTML; in linear time.

https://docs.slack.dev/messaging/formatting-message-text: `&`, `<` and `>` arrive escaped, and are un-escaped once. What
Mattermost's senders write in the same field is Markdown: `**bold**`, `[text](address)`, headings and lists work, too.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from flowbridge.sources.emoji import with_emoji

MAX_CHARACTERS = 40_000  # of all texts of a message: an event holds fewer

_ESCAPED = re.compile(r"&(lt|gt|amp);")
_CHARACTERS = {"lt": "<", "gt": ">", "amp": "&"}
_TOKEN = re.compile(
    r"(?P<code>`[^`\n]+`)"
    r"|<(?P<angle>[^<>]+)>"
    r"|\[(?P<text>[^\[\]\n]+)\]\((?P<url>https?://[^\s()<>]+)\)"
    r"|(?P<address>https?://[^\s<>|\"`]+)"
    r"|(?P<run>\*{1,2}|_+|~{1,2})"
    r"|(?P<line>\n)"
)
_LINK = re.compile(r"(?:https?|ftp)://\S+|mailto:\S+", re.IGNORECASE)
_TAGS = {"*": "strong", "**": "strong", "_": "em", "~": "del", "~~": "del"}
_ITEM = re.compile(r"\s*(?:[-*•◦▪]|\u2013)\s+(?=\S)")
_QUOTE = re.compile(r"(?:&gt;)+\s*")
_HEADING = re.compile(r"#{1,6}\s+(?=\S)")
_EVERYBODY = {"channel": "@channel", "here": "@here", "everyone": "@everyone"}
_TRAILING = ".,;:!?)'*_~"


@dataclass(slots=True)
class Mrkdwn:
    """Converts the texts of one message. `mentions_room`: whether one of them called everybody."""

    mentions_room: bool = False
    _left: int = MAX_CHARACTERS

    def html(self, text: str) -> str:
        """All of the text: one paragraph has no tag around it."""
        return joined(self.blocks(text))

    def blocks(self, text: str) -> list[str]:
        """The paragraphs, lists, quotes and code blocks of a text, each in its tag."""
        found: list[str] = []
        text = self._taken(text)
        pieces = text.replace("\r\n", "\n").replace("\r", "\n").split("```")
        if len(pieces) % 2 == 0:  # the last one is never closed
            pieces[-2:] = [f"{pieces[-2]}```{pieces[-1]}"]
        for number, piece in enumerate(pieces):
            if number % 2:
                if code := self._verbatim(piece).strip("\n"):
                    found.append(f"<pre><code>{escape(code, quote=False)}</code></pre>")
            else:
                found += _blocks(self._inline(piece).split("\n"))
        return found

    def line(self, text: str) -> str:
        """A text without blocks, as a title is."""
        return " ".join(self._inline(self._taken(text)).split())

    def plain(self, text: str) -> str:
        """A text without any marks."""
        return escape(with_emoji(self._taken(text.strip())), quote=False).replace("\n", "<br>")

    def _taken(self, text: str) -> str:
        """What is left of MAX_CHARACTERS."""
        taken = text[: self._left]
        self._left -= len(taken)
        return taken if len(taken) == len(text) else f"{taken}…"

    def _inline(self, text: str) -> str:
        """Without blocks: a line break stays one."""
        pieces: list[str] = []
        opened: list[tuple[str, int]] = []  # what may yet be closed: the mark, and where its piece is
        at = 0
        while (token := _TOKEN.search(text, at)) is not None:
            if token.start() > at:
                pieces.append(_shown(text[at : token.start()]))
            at = token.end()
            kind, value = token.lastgroup, token[0]
            if kind == "line":
                opened.clear()
                pieces.append("\n")
            elif kind == "run":
                _add_mark(pieces, opened, value, text[token.start() - 1 : token.start()], text[at : at + 1])
            elif kind == "code":
                pieces.append(f"<code>{escape(_plain(self._verbatim(value[1:-1])), quote=False)}</code>")
            elif kind == "angle":
                pieces.append(self._angle(token["angle"]))
            elif kind == "url":
                pieces.append(link(token["url"], token["text"]))
            else:
                address = value.rstrip(_TRAILING)
                pieces.append(link(address, address))
                at = token.start() + len(address)  # what comes behind it may be a mark
        pieces.append(_shown(text[at:]))
        return "".join(pieces)

    def _verbatim(self, text: str) -> str:
        """Links in code are their texts."""
        return _plain(re.sub(r"<((?:https?|mailto):[^<>|]*)(?:\|([^<>]*))?>", lambda found: found[2] or found[1], text))

    def _angle(self, inside: str) -> str:
        target, _, label = inside.partition("|")
        label = label.replace("\n", " ").strip()
        if _LINK.fullmatch(target):
            return link(target, label or target.removeprefix("mailto:"))
        if target[:1] in "@#" and re.fullmatch(r"[@#][\w.-]+", target):
            return _shown(f"{target[0]}{label.lstrip('@#') or target[1:]}")
        if target.startswith("!"):
            return self._special(target[1:], label)
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", target) and label:
            return _shown(label)
        return _shown(f"<{inside}>")

    def _special(self, name: str, label: str) -> str:
        if name in _EVERYBODY:
            self.mentions_room = True
            return _EVERYBODY[name]
        kind, _, rest = name.partition("^")
        if kind == "date":
            seconds, *others = rest.split("^")
            shown = label or _date(seconds)
            url = others[1] if len(others) > 1 else ""
            return link(url, shown) if _LINK.fullmatch(url) else _shown(shown)
        return _shown(label or f"@{kind}")


def link(url: str, text: str) -> str:
    """`url`, `text`: escaped as Slack does."""
    address = _plain(url)
    if not _LINK.fullmatch(address):
        return _shown(text)
    return f'<a href="{escape(address)}">{_shown(text) if text != url else escape(address, quote=False)}</a>'


def joined(blocks: list[str]) -> str:
    """One paragraph alone needs no tag."""
    if len(blocks) == 1 and blocks[0].startswith("<p>"):
        return blocks[0].removeprefix("<p>").removesuffix("</p>")
    return "\n".join(blocks)


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda found: _CHARACTERS[found[1]], text) if "&" in text else text


def _shown(text: str) -> str:
    return escape(with_emoji(_plain(text)), quote=False) if text else ""


def _add_mark(pieces: list[str], opened: list[tuple[str, int]], mark: str, before: str, after: str) -> None:
    """A mark closes the one like it that is open in this line, or opens, or is a text."""
    tag = _TAGS.get(mark)
    if tag and before.strip() and not _is_word(after):
        for depth in range(len(opened) - 1, max(-1, len(opened) - 7), -1):  # there are six different ones
            if opened[depth][0] == mark and opened[depth][1] < len(pieces) - 1:
                pieces[opened[depth][1]] = f"<{tag}>"
                pieces.append(f"</{tag}>")
                del opened[depth:]
                return
    if tag and after.strip() and not _is_word(before) and all(name != mark for name, _ in opened):
        opened.append((mark, len(pieces)))
    pieces.append(mark)


def _is_word(character: str) -> bool:
    return character.isalnum()


def _blocks(lines: list[str]) -> list[str]:
    found: list[str] = []
    kind, held = "", [""][:0]

    def close() -> None:
        nonlocal held
        if kind == "quote":
            found.append(f"<blockquote>{'<br>'.join(held)}</blockquote>")
        elif kind == "list":
            found.append(f"<ul>{''.join(f'<li>{each}</li>' for each in held)}</ul>")
        elif held:
            found.append(f"<p>{'<br>'.join(held)}</p>")
        held = []

    for each in lines:
        line = each.strip()
        if quote := _QUOTE.match(line):
            now, line = "quote", line[quote.end() :]
        elif item := _ITEM.match(each):
            now, line = "list", each[item.end() :].strip()
        elif heading := _HEADING.match(line):
            now, line = "heading", f"<strong>{line[heading.end() :]}</strong>"
        else:
            now = "text" if line else ""
        if now != kind or now == "heading":
            close()
        kind = now
        if line:
            held.append(line)
    close()
    return [block for block in found if block not in ("<blockquote></blockquote>", "<ul></ul>")]


def _date(seconds: str) -> str:
    try:
        return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return seconds
