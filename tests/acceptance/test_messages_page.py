"""docs/messages.md: every command of the page, what they say it prints, and what is in the room then.

FLOWBRIDGE_SCREENSHOTS=1 also makes the page's pictures again, of the events that the commands made. That needs Chromium
and a font with emoji (Debian's `chromium` and `fonts-noto-color-emoji`).
"""

import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests import transcripts, view
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import Room
from tests.integration.test_media import png
from tests.patience import PATIENCE
from tests.processes import FLOWBRIDGE, REPOSITORY, environment, free_port, run, serving_at
from tests.transcripts import Step

PAGE = (REPOSITORY / "docs" / "messages.md").read_text()
ALICES = "$rWGPf2w2"  # the page's name for what Alice has said
TEXT = {"msgtype": "m.text", "m.mentions": {}}
HTML = {"format": "org.matrix.custom.html"}


@dataclass(frozen=True)
class World:
    """A bridge in a folder, its bot in a room, and Alice, who has asked something there."""

    folder: Path
    room: Room
    alice: Account
    bot: Account
    question: str
    names: dict[str, str]
    environment: dict[str, str]

    def play(self, title: str) -> list[dict[str, Any]]:
        """The commands of a section; what is in the room by them."""
        before = len(self.events())
        script = [*transcripts.steps(PAGE.partition("\n## ")[0]), *transcripts.steps(transcripts.section(PAGE, title))]
        key, *script = [
            Step(transcripts.replaced(step.command, self.names), transcripts.replaced(step.output, self.names))
            for step in script
        ]
        assert key.command == "KEY=fb_…"
        transcripts.check(script, self.folder, self.environment)
        return self.events()[before:]

    def play_inline(self, title: str) -> list[dict[str, Any]]:
        """As `play`, for the commands in a section's text and tables, which leave out the key, and `…` the room."""
        before = len(self.events())
        room = f"{self.names['http://localhost:8090']}/rooms/{self.room.id}"
        found = re.findall(
            r"`([^`]*curl [^`]+)`", re.sub(r"```.*?```", "", transcripts.section(PAGE, title), flags=re.DOTALL)
        )
        commands = [command.replace("\\|", "|").replace("curl ", 'curl -f -H "X-API-Key: $KEY" ') for command in found]
        script = [Step(command.replace("…", room), "") for command in commands]
        transcripts.check([Step(f"ROOM={room}", ""), *script], self.folder, self.environment)
        return self.events()[before:]

    def events(self) -> list[dict[str, Any]]:
        """Everything in the room that a client shows, the oldest first."""
        found = self.room._get("messages?dir=f&limit=500")["chunk"]
        return [event for event in found if event["type"] in ("m.room.message", "m.reaction", "m.room.redaction")]

    def picture(self, name: str, *shown: str) -> None:
        """What the page shows, of these events. Made, and put where it is shown, only if it is wanted."""
        names = {self.bot.user_id: "flowbot", self.alice.user_id: "Alice"}
        html = view.page(self.events(), names, shown, self.fetch)
        assert html.count('<div class="event') >= len(shown)
        if os.environ.get("FLOWBRIDGE_SCREENSHOTS") == "1":
            folder = REPOSITORY / "docs" / "pictures"
            folder.mkdir(exist_ok=True)
            view.picture(html, folder / f"{name}.png", self.folder)

    def fetch(self, uri: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.bot.access_token}"}
        path = f"/_matrix/client/v1/media/download/{uri.removeprefix('mxc://')}"
        return self.room.direct.get(path, headers=headers).raise_for_status().content


class Grafana(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(graph())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the library's name)
        """Not into the output of the tests."""


def graph() -> bytes:
    """A load curve: 380 by 130."""
    heights = [20 + 7 * (x * x * 31 % 11) + (x > 60) * min(x - 60, 25) for x in range(95)]
    rows = []
    for y in range(130):
        row = bytearray(b"\0")
        for x in range(380):
            on = 130 - y < heights[x // 4]
            row += b"\x3d\x6f\xb4" if on else b"\xe6\xe9\xef" if y % 26 == 0 else b"\xf7\xf8\xfa"
        rows.append(bytes(row))
    return png(380, 130, b"".join(rows))


@pytest.fixture(scope="module")
def world(
    synapse: LocalSynapse, make_account: MakeAccount, make_room: MakeRoom, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("messages")
    bot, alice = make_account(), make_account()
    site = HTTPServer(("127.0.0.1", 0), Grafana)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    settings = {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{folder}/flowbridge.db",
        "FLOWBRIDGE_WAIT_SECONDS": str(PATIENCE),
        "FLOWBRIDGE_REQUEST_SECONDS": "5",
        "FLOWBRIDGE_LEASE_SECONDS": "12",
        "FLOWBRIDGE_FETCH_ALLOW": "127.0.0.1",
    }
    (folder / "report.pdf").write_bytes(b"%PDF-1.4\n")
    (folder / "load.png").write_bytes(graph())
    tools = {"PATH": os.pathsep.join([str(Path(FLOWBRIDGE).parent), os.environ["PATH"]]), "CURL_HOME": str(folder)}
    (folder / ".curlrc").write_text('silent\nnoproxy = "*"\n')
    with serving_at(free_port(), settings) as (url, _), httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        room = Room(make_room(alice, invite=[bot.user_id]), alice, direct)
        key = run("keys", "create", "--room", room.id, **settings).stdout.strip()
        joined = httpx.post(f"{url}/join/{room.id}", headers={"X-API-Key": key}, trust_env=False)
        assert joined.status_code == 200, joined.text
        asked = direct.put(
            f"/_matrix/client/v3{room.path}/send/m.room.message/1",
            json={"msgtype": "m.text", "body": "Is web-1 down?"},
            headers={"Authorization": f"Bearer {alice.access_token}"},
        )
        question = asked.raise_for_status().json()["event_id"]
        names = {
            "http://localhost:8090": url,
            "!ops:example.org": room.id,
            "@alice:example.org": alice.user_id,
            "https://grafana.example.org/load.png": f"http://127.0.0.1:{site.server_port}/load.png",
            ALICES: question,
        }
        yield World(folder, room, alice, bot, question, names, {**environment(settings), **tools, "KEY": key})
    site.shutdown()
    site.server_close()


def contents(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["content"] for event in events]


def ids(events: list[dict[str, Any]]) -> list[str]:
    return [event["event_id"] for event in events]


def test_text(world: World) -> None:
    events = world.play("A text")
    assert contents(events) == [{**TEXT, "body": "the backup is done"}]
    world.picture("text", *ids(events))


def test_markdown_and_html(world: World) -> None:
    events = world.play("Markdown, HTML")
    markdown, html = contents(events)
    assert "<strong>web-1</strong> is slow, see <a href=" in markdown["formatted_body"]
    assert "<li><code>nginx</code> restarts</li>" in markdown["formatted_body"]
    assert html["msgtype"] == "m.notice"
    assert "<td>12</td>" in html["formatted_body"]
    world.picture("markdown", *ids(events))
    (world.folder / "report.md").write_text("# All is well\n\n- yes\n")
    world.play_inline("Markdown, HTML")
    report = world.events()[-1]["content"]["formatted_body"]
    assert "<strong>Report</strong>" in report
    assert "<h1>All is well</h1>" in report


def test_title(world: World) -> None:
    events = world.play("A title")
    formatted = "<strong>Backup</strong><br>done in 12 minutes"
    assert contents(events) == [{**TEXT, **HTML, "body": "Backup\ndone in 12 minutes", "formatted_body": formatted}]
    world.picture("title", *ids(events))


def test_mention(world: World) -> None:
    events, alice = world.play("Mentions"), world.alice.user_id
    (content,) = contents(events)
    assert content["m.mentions"] == {"user_ids": [alice]}
    assert content["formatted_body"] == f'<a href="https://matrix.to/#/{alice}">{alice}</a> the build is done'
    world.picture("mention", *ids(events))


def test_reply(world: World) -> None:
    events = world.play("Replies")
    (content,) = contents(events)
    assert content["m.relates_to"] == {"m.in_reply_to": {"event_id": world.question}}
    world.picture("reply", world.question, *ids(events))


def test_edit(world: World) -> None:
    events = world.play("Edits, and keys")
    first, second = events
    assert second["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": first["event_id"]}
    assert second["content"]["m.new_content"] == {**TEXT, "body": "build 17 has passed"}
    world.picture("edit", first["event_id"])


def test_thread(world: World) -> None:
    events = world.play("Threads")
    root, *replies = events
    assert len(replies) == 2
    for reply in contents(replies):
        assert (reply["m.relates_to"]["rel_type"], reply["m.relates_to"]["event_id"]) == ("m.thread", root["event_id"])
    world.picture("thread", root["event_id"])


def test_reaction_and_redaction(world: World) -> None:
    reaction, message, redaction = world.play("Reactions and redactions")
    assert reaction["content"]["m.relates_to"] == {
        "rel_type": "m.annotation",
        "event_id": world.question,
        "key": "✅",
    }
    assert (message["content"], redaction["content"]["reason"]) == ({}, "wrong room")
    world.picture("reaction", world.question, message["event_id"])


def test_files(world: World) -> None:
    events = world.play("Files")
    text, report, picture = contents(events)
    assert text["body"] == "The report of today:"
    assert (report["msgtype"], report["filename"]) == ("m.file", "report.pdf")
    assert (picture["msgtype"], picture["body"], picture["filename"]) == ("m.image", "web-1, last hour", "load.png")
    assert (picture["info"]["w"], picture["info"]["h"]) == (380, 130)
    assert world.fetch(picture["url"]) == graph()
    world.picture("files", *ids(events))


def test_each_way_to_send(world: World) -> None:
    (world.folder / "report.txt").write_text("two\nlines\n")
    (world.folder / "camera.png").write_bytes(png())
    text, report, piped, notice, form, yard, camera = contents(world.play_inline("How to send one"))
    assert (text["body"], report["body"]) == ("backup done", "two\nlines")
    assert "Filesystem" in piped["body"]
    assert (notice["msgtype"], notice["formatted_body"]) == ("m.notice", "<strong>Backup</strong><br><em>done</em>")
    assert form["formatted_body"] == "<strong>Backup</strong><br><em>done</em>"
    assert (yard["body"], camera["filename"], camera["msgtype"]) == ("the yard", "camera.png", "m.image")


def test_shell(world: World) -> None:
    backup, report, picture, disk = contents(world.play("From a shell"))
    assert backup["m.mentions"] == {"user_ids": [world.alice.user_id]}
    assert (report["body"], picture["body"]) == ("today", "web-1, last hour")
    assert disk["msgtype"] == "m.notice"
    assert "Filesystem" in disk["body"]


def test_every_picture_of_the_page_is_one_of_these() -> None:
    """And each command is in a section that is played."""
    here = Path(__file__).read_text()
    assert set(re.findall(r"\(pictures/([a-z]+)\.png\)", PAGE)) == set(re.findall(r'\.picture\("([a-z]+)"', here))
    _, *sections = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    played = {title for title, text in zip(sections[::2], sections[1::2], strict=True) if transcripts.steps(text)}
    assert played == set(re.findall(r'\.play\("([^"]+)"\)', here))
