"""A room as Matrix clients show it, for the pictures in docs/messages.md: its events as HTML, and that by Chromium.

No client that shows all of it comes from a package registry, so this lays out what clients do with events: the newest
edit in the place of a message, a quotation above a reply, a thread below its root, reactions as chips, links to users
as pills with their names. It shows only what the homeserver gave.
"""

import base64
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.integration.test_media import png

Event = dict[str, Any]

WIDTH = 640
SCALE = 1.5
_PILL = re.compile(r'<a href="https://matrix\.to/#/(@[^"]+)">[^<]*</a>')
_MEASURE = "document.title = document.documentElement.getBoundingClientRect().height"
_STYLE = """
body { margin: 0; padding: 14px 18px 16px; width: 604px; font: 15px/1.45 "DejaVu Sans", sans-serif; color: #1b1d22;
       background: #fff; box-sizing: content-box }
.event { display: grid; grid-template-columns: 36px 1fr; column-gap: 12px; margin-top: 10px }
.event:first-child { margin-top: 0 }
.avatar { width: 34px; height: 34px; border-radius: 50%; color: #fff; text-align: center; line-height: 34px }
.name { font-weight: bold; font-size: 14px }
.text p { margin: 0 0 6px } .text p:last-child { margin: 0 } .text ul, .text ol { margin: 4px 0; padding-left: 22px }
.text table { border-collapse: collapse; margin: 4px 0 } .text td, .text th { border: 1px solid #ccd; padding: 2px 9px }
.text code { background: #f0f1f4; padding: 1px 4px; border-radius: 3px; font-size: 13px } .text a { color: #0467dd }
.text blockquote { border-left: 3px solid #c9d2e0; margin: 6px 0; padding-left: 9px; color: #555 }
.notice .text { color: #656d77 } .gone { color: #656d77; font-style: italic }
.pill { background: #dde9fb; color: #0a4fa8; border-radius: 11px; padding: 1px 9px }
.quote { border-left: 3px solid #8a9bb5; padding-left: 9px; margin: 2px 0 4px; font-size: 13px; color: #555 }
.edited { color: #8b929c; font-size: 12px; margin-left: 7px }
.reaction { display: inline-block; border: 1px solid #b9cdf0; background: #edf3fd; border-radius: 12px; padding: 0 9px;
            margin-top: 5px; font-size: 14px }
.thread { border-left: 2px solid #c9d2e0; margin: 6px 0 0 16px; padding: 2px 0 0 14px }
.thread > .count { color: #656d77; font-size: 12px }
img { display: block; max-width: 380px; border-radius: 7px; margin-top: 4px }
.file { display: inline-block; border: 1px solid #ccd; border-radius: 7px; padding: 5px 12px; margin-top: 4px }
"""


def page(events: Iterable[Event], names: Mapping[str, str], shown: Iterable[str], fetch: Callable[[str], bytes]) -> str:
    """The HTML of the events with the ids in `shown`. `names`: of users; `fetch`: the file at an mxc:// address."""
    view = _View(list(events), names, fetch)
    found = "".join(view.event(event) for event in view.timeline if event["event_id"] in set(shown))
    return f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style><body>{found}'


class _View:
    def __init__(self, events: list[Event], names: Mapping[str, str], fetch: Callable[[str], bytes]) -> None:
        self._names, self._fetch = names, fetch
        self._by_id = {event["event_id"]: event for event in events}
        self._edits: dict[str, Event] = {}
        self._reactions: dict[str, Counter[str]] = defaultdict(Counter)
        self._threads: dict[str, list[Event]] = defaultdict(list)
        self.timeline: list[Event] = []
        for event in events:
            relation = event["content"].get("m.relates_to", {})
            match relation.get("rel_type"):
                case "m.replace":
                    self._edits[relation["event_id"]] = event["content"]["m.new_content"]
                case "m.annotation":
                    self._reactions[relation["event_id"]][relation["key"]] += 1
                case "m.thread":
                    self._threads[relation["event_id"]].append(event)
                case _ if event["type"] == "m.room.message":
                    self.timeline.append(event)

    def event(self, event: Event) -> str:
        event_id, sender = event["event_id"], event["sender"]
        content: Event = self._edits.get(event_id) or event["content"]
        name = self._names[sender]
        colour = "#3d6fb4" if name == "flowbot" else "#7a5ab8"
        kind = "notice" if content.get("msgtype") == "m.notice" else ""
        parts = [
            f'<div class="name" style="color: {colour}">{escape(name)}</div>',
            self._quote(event),
            self._body(content),
        ]
        if event_id in self._edits:
            parts.append('<span class="edited">(edited)</span>')
        parts += [
            f'<div><span class="reaction">{escape(key)} {number}</span></div>'
            for key, number in self._reactions[event_id].items()
        ]
        if replies := self._threads[event_id]:
            count = f"{len(replies)} {'reply' if len(replies) == 1 else 'replies'} in a thread"
            inside = "".join(map(self.event, replies))
            parts.append(f'<div class="thread"><div class="count">{count}</div>{inside}</div>')
        avatar = f'<div class="avatar" style="background: {colour}">{escape(name[0].upper())}</div>'
        return f'<div class="event {kind}">{avatar}<div>{"".join(parts)}</div></div>'

    def _quote(self, event: Event) -> str:
        relation = event["content"].get("m.relates_to", {})
        target = self._by_id.get(relation.get("m.in_reply_to", {}).get("event_id", ""))
        if target is None or relation.get("is_falling_back"):
            return ""
        name, body = self._names[target["sender"]], target["content"]["body"]
        return f'<div class="quote"><b>{escape(name)}</b><br>{escape(body)}</div>'

    def _body(self, content: Event) -> str:
        if "msgtype" not in content:
            return '<span class="gone">Message deleted</span>'
        shown = ""
        caption = content["body"] if content["body"] != content.get("filename", content["body"]) else ""
        if content["msgtype"] == "m.image":
            data = base64.b64encode(self._fetch(content["url"])).decode()
            shown = f'<img src="data:{content["info"]["mimetype"]};base64,{data}">'
        elif content["msgtype"] == "m.file":
            shown = f'<div class="file">📎 {escape(content["filename"])}</div>'
        if shown:
            return shown + (f'<div class="text">{escape(caption)}</div>' if caption else "")
        html = content.get("formatted_body") or escape(content["body"]).replace("\n", "<br>")
        return f'<span class="text">{_PILL.sub(self._pill, html)}</span>'

    def _pill(self, found: re.Match[str]) -> str:
        user = unquote(found[1])
        return f'<span class="pill">{escape(self._names.get(user, user))}</span>'


def picture(html: str, file: Path, folder: Path) -> None:
    """The page, as high as it is. Chromium is started twice: the first time to measure."""
    source, shot = folder / f"{file.stem}.html", folder / f"{file.stem}.png"
    source.write_text(
        f"{html}<script>document.title = document.documentElement.getBoundingClientRect().height</script>"
    )
    (height,) = re.findall(r"<title>([0-9.]+)</title>", _chromium(folder, 400, "--dump-dom", source.as_uri()))
    high = round(float(height))
    # The window is higher than what it shows, by what a browser has above a page.
    _chromium(folder, high + 200, f"--force-device-scale-factor={SCALE}", f"--screenshot={shot}", source.as_uri())
    file.write_bytes(_top(shot.read_bytes(), int(high * SCALE)))


def _top(picture: bytes, height: int) -> bytes:
    """The upper rows: a row of a PNG refers to those above it alone."""
    width, _, depth, kind = struct.unpack(">IIBB", picture[16:26])
    assert (depth, kind) == (8, 2), "not RGB"
    data, at = b"", 8
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        if picture[at + 4 : at + 8] == b"IDAT":
            data += picture[at + 8 : at + 8 + length]
        at += 12 + length
    return png(width, height, zlib.decompress(data)[: height * (1 + 3 * width)])


def _chromium(folder: Path, height: int, *arguments: str) -> str:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program is not None, "pictures need Chromium"
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/chromium"]
    done = subprocess.run(
        [program, *always, f"--window-size={WIDTH},{height}", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
