"""`flowbridge send` with a message as people write it: what it takes is in its room once, now or later."""

import os
import pty
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import LocalSynapse
from tests import upstream as scripted
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import Room
from tests.integration.test_media import png
from tests.patience import PATIENCE
from tests.processes import FLOWBRIDGE, environment, free_port, run, serving_at
from tests.upstream import Behaviour, Request, Rooms, Upstream

ROOM = "!room:upstream"
HTML = "org.matrix.custom.html"
SOON = {"FLOWBRIDGE_WAIT_SECONDS": "60", "FLOWBRIDGE_REQUEST_SECONDS": "5", "FLOWBRIDGE_LEASE_SECONDS": "12"}


class Homeserver(Rooms):
    """With files, each upload at an address of its own."""

    uploads = 0

    def __call__(self, request: Request) -> Behaviour | None:
        match (request.method, *request.parts[1:]):
            case ("GET", "client", "v1", "media", "config"):
                return scripted.answer({"m.upload.size": 1_000})
            case ("POST", "media", "v3", "upload"):
                self.uploads += 1
                return scripted.answer({"content_uri": f"mxc://upstream/{self.uploads}"})
        return super().__call__(request)


@pytest.fixture
def rooms() -> Homeserver:
    return Homeserver()


@pytest.fixture
def upstream(rooms: Homeserver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    monkeypatch.chdir(tmp_path)  # the store is made there
    assert run("init").returncode == 0
    with Upstream(rooms) as server:
        yield server


def send(upstream: Upstream, *arguments: str, stdin: str = "", **settings: str) -> "tuple[int, str, str]":
    done = run("send", ROOM, *arguments, stdin=stdin, BASE_URL=upstream.url, ACCESS_TOKEN="bot", **settings)
    return done.returncode, done.stdout, done.stderr


def contents(rooms: Homeserver) -> list[dict[str, Any]]:
    return [event.content for event in rooms.events]


# with a real homeserver


@pytest.fixture
def room(
    synapse: LocalSynapse,
    make_account: MakeAccount,
    make_room: MakeRoom,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Room]:
    """The bot's, whose settings are in the folder's `.env`."""
    monkeypatch.chdir(tmp_path)
    bot = make_account()
    settings = {"BASE_URL": synapse.url, "ACCESS_TOKEN": bot.access_token, **SOON}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    assert run("init").returncode == 0
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        yield Room(make_room(bot), bot, direct)


def said(room: Room, *arguments: str, stdin: str = "") -> list[str]:
    done = run("send", room.id, *arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


def test_it_is_in_the_room_as_a_client_would_have_written_it(room: Room, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png())
    (tmp_path / "notes.json").write_text('{"data": "bm8gZmlsZSBpbnNpZGU="}')
    alice = "@alice:localhost"
    (first,) = said(room, "--markdown", f"**done**, {alice}", "--title", "Backup", "--mention", alice, "--notice")
    (reply,) = said(room, "--text", "all of it?", "--reply-to", first)
    (in_thread,) = said(room, "--html", "<b>yes</b>", "--thread", first)
    text, picture, notes = said(
        room, "--text", "see", "--file", "cat.png", "--caption", "the yard", "--file", "notes.json"
    )
    (build,) = said(room, "--text", "building", "--key", "build 17")
    (built,) = said(room, "--text", "built", "--key", "build 17")
    (edit,) = said(room, "--text", "all of it!", "--edit", reply)

    assert room.event(first)["content"] == {
        "msgtype": "m.notice",
        "body": f"Backup\n**done**, {alice}",
        "format": HTML,
        "formatted_body": "<strong>Backup</strong><br><strong>done</strong>, "
        f'<a href="https://matrix.to/#/{alice}">{alice}</a>',
        "m.mentions": {"user_ids": [alice]},
    }
    assert room.event(reply)["content"]["m.relates_to"] == {"m.in_reply_to": {"event_id": first}}
    relation = room.event(in_thread)["content"]["m.relates_to"]
    assert (relation["rel_type"], relation["event_id"]) == ("m.thread", first)
    assert room.event(text)["content"]["body"] == "see"
    image = room.event(picture)["content"]
    assert (image["msgtype"], image["body"], image["filename"]) == ("m.image", "the yard", "cat.png")
    assert image["info"] == {"mimetype": "image/png", "size": len(png()), "w": 640, "h": 480}
    assert fetched(room, image["url"]) == png()
    file = room.event(notes)["content"]
    assert (file["msgtype"], file["body"], file["info"]["mimetype"]) == ("m.file", "notes.json", "application/json")
    assert fetched(room, file["url"]) == (tmp_path / "notes.json").read_bytes(), "and not what it could hold"
    for event_id, target in ((built, build), (edit, reply)):
        assert room.event(event_id)["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": target}


def test_beside_a_running_bridge_it_goes_through_that(room: Room, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png())
    with serving_at(free_port(), {}):
        text, picture = said(room, "--markdown", "*see*", "--key", "yard", "--file", "cat.png")
        (edit,) = said(room, "--text", "seen", "--key", "yard")  # into a lane that the bridge holds
    assert fetched(room, room.event(picture)["content"]["url"]) == png()
    assert [event["event_id"] for event in room.messages()] == [text, picture, edit]
    assert room.event(edit)["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": text}


def fetched(room: Room, uri: str) -> bytes:
    headers = {"Authorization": f"Bearer {room.owner.access_token}"}
    path = f"/_matrix/client/v1/media/download/{uri.removeprefix('mxc://')}"
    return room.direct.get(path, headers=headers).raise_for_status().content


def test_a_user_is_a_room(room: Room, make_account: MakeAccount) -> None:
    alice = make_account()
    done = run("send", alice.user_id, "--text", "hello")
    assert done.returncode == 0, done.stderr
    headers = {"Authorization": f"Bearer {alice.access_token}"}
    invited = room.direct.get("/_matrix/client/v3/sync", headers=headers).json()["rooms"]["invite"]
    (direct,) = invited
    assert Room(direct, room.owner, room.direct).bodies() == ["hello"]


def test_too_large_a_file_is_named_and_nothing_is_sent(room: Room, tmp_path: Path) -> None:
    with (tmp_path / "dump.bin").open("wb") as file:
        file.truncate(200 * 1024 * 1024)
    done = run("send", room.id, "--text", "the dump", "--file", "dump.bin")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"M_TOO_LARGE: dump\.bin: the file is too large: at most \d+ bytes may be uploaded\n", done.stderr
    )
    assert room.messages() == []


# standard input


@pytest.mark.parametrize("arguments", [[], ["-"], ["--text", "-"], ["-", "-"]], ids=" ".join)
def test_standard_input_is_a_text(upstream: Upstream, rooms: Homeserver, arguments: list[str]) -> None:
    assert send(upstream, *arguments, stdin='{"text": "grün"}\n\n')[:2] == (0, "$1\n")
    assert contents(rooms) == [{"msgtype": "m.text", "body": '{"text": "grün"}', "m.mentions": {}}]


def test_standard_input_is_markdown(upstream: Upstream, rooms: Homeserver) -> None:
    code, _, errors = send(upstream, "--markdown", "-", "--title", "T", stdin="# a\n")
    assert code == 0, errors
    (content,) = contents(rooms)
    assert "<h1>a</h1>" in content["formatted_body"]


def test_a_file_waits_for_no_input(upstream: Upstream, rooms: Homeserver, tmp_path: Path) -> None:
    """Standard input may stay open, as it does under ssh."""
    (tmp_path / "a.txt").write_text("a")
    with subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE) as open_input:
        try:
            done = piped(upstream, "--file", "a.txt", stdin=open_input.stdout)
        finally:
            open_input.kill()
    assert (done.returncode, done.stdout) == (0, b"$1\n"), done.stderr
    assert contents(rooms)[0]["msgtype"] == "m.file"


def piped(upstream: Upstream, *arguments: str, stdin: Any) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [FLOWBRIDGE, "send", ROOM, *arguments],
        env=environment({"BASE_URL": upstream.url, "ACCESS_TOKEN": "bot"}),
        stdin=stdin,
        capture_output=True,
        timeout=4 * PATIENCE,
    )


def test_a_pipe_is_a_file(upstream: Upstream, rooms: Homeserver) -> None:
    code, printed, errors = send(upstream, "--file", "/dev/stdin", stdin="lines")
    assert (code, printed) == (0, "$1\n"), errors
    (content,) = contents(rooms)
    assert (content["msgtype"], content["filename"]) == ("m.file", "stdin")


def test_terminal_is_told_what_to_type(upstream: Upstream, rooms: Homeserver) -> None:
    """`send ROOM 'backup done'`: a text in the place of a type, and nothing would seem to happen."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"{}\n\x04")
        done = piped(upstream, "backup done", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stderr == b"Type the payload of backup done, then Ctrl-D. To say a text: --text '\xe2\x80\xa6'\n"
    assert [event.type for event in rooms.events] == ["backup done"], "as ever"


# faults


def test_what_cannot_be_sent_now_is_queued_and_sent_by_the_next_bridge(
    upstream: Upstream, rooms: Homeserver, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert send(upstream, "--text", "first")[0] == 0

    def half(request: Request) -> Behaviour | None:
        return scripted.html(502) if request.method == "PUT" else rooms(request)

    upstream.script(half)
    code, printed, errors = send(upstream, "--text", "second", "--file", "a.txt", FLOWBRIDGE_WAIT_SECONDS="1")
    assert (code, printed) == (0, ""), errors
    assert "\nqueued: " in f"\n{errors}"
    (delivery,) = re.findall(r"flowbridge deliveries show (\S+)`", errors)
    upstream.script(rooms)
    settings = {"BASE_URL": upstream.url, "ACCESS_TOKEN": "bot"}
    with serving_at(free_port(), settings):
        rooms.wait_for(3)
    assert rooms.bodies == ["first", "second", "a.txt"]
    assert '"sent"' in run("deliveries", "show", delivery, "--json", **settings).stdout


def test_a_file_cannot_be_queued(upstream: Upstream, rooms: Homeserver, tmp_path: Path) -> None:
    """It goes to the homeserver before the message is accepted: there is none, so nothing is."""
    (tmp_path / "a.txt").write_text("a")
    assert send(upstream, "--text", "first")[0] == 0
    upstream.always(scripted.html(502), at="/media/")
    code, printed, errors = send(upstream, "--text", "see", "--file", "a.txt", FLOWBRIDGE_WAIT_SECONDS="1")
    assert (code, printed) == (1, "")
    assert "Bad Gateway" in errors or "502" in errors, errors
    assert '"deliveries": []' in run("deliveries", "list", "--state", "queued", "--json").stdout


def test_a_repeat_under_a_key_sends_nothing_more(upstream: Upstream, rooms: Homeserver, tmp_path: Path) -> None:
    """By its files' content: a file of that name may be another one."""
    (tmp_path / "a.txt").write_text("a")
    again = ("--text", "see", "--file", "a.txt", "--idempotency-key", "job 1")
    assert send(upstream, *again)[:2] == (0, "$1\n$2\n")
    assert send(upstream, *again)[:2] == (0, "$1\n$2\n")
    assert (rooms.bodies, rooms.uploads) == (["see", "a.txt"], 1)
    (tmp_path / "a.txt").write_text("b")
    code, printed, errors = send(upstream, *again)
    assert (code, printed) == (1, "")
    assert "Idempotency-Key" in errors
    event = ("m.room.message", "x", "--idempotency-key", "job 2")
    assert send(upstream, *event)[:2] == (0, "$3\n")
    assert send(upstream, *event)[:2] == (0, "$3\n")


def test_a_refusal_is_told_and_nothing_is_queued(upstream: Upstream, rooms: Homeserver) -> None:
    def refusing(request: Request) -> Behaviour | None:
        if request.method == "PUT":
            return scripted.matrix_error(403, "M_FORBIDDEN", "You are not allowed to send that")
        return rooms(request)

    upstream.script(refusing)
    code, printed, errors = send(upstream, "--text", "no")
    assert (code, printed) == (1, "")
    assert "M_FORBIDDEN" in errors


def test_part_of_a_message_is_told(upstream: Upstream, rooms: Homeserver, tmp_path: Path) -> None:
    """The exit code is 0: a retry would say the rest twice."""
    (tmp_path / "a.txt").write_text("a")

    def refusing(request: Request) -> Behaviour | None:
        if request.method == "PUT" and request.json().get("msgtype") == "m.file":
            return scripted.matrix_error(403, "M_FORBIDDEN", "no files here")
        return rooms(request)

    upstream.script(refusing)
    code, printed, errors = send(upstream, "--text", "see", "--file", "a.txt")
    assert (code, printed) == (0, "$1\n")
    assert re.search(r"^delivery \S+ is not in the room: M_FORBIDDEN: no files here", errors, re.MULTILINE), errors


def test_an_unknown_key_is_told(upstream: Upstream, rooms: Homeserver) -> None:
    code, printed, errors = send(upstream, "--text", "and now?", "--reply-to", "key:no-such")
    assert (code, printed) == (0, "$1\n")
    assert errors.startswith("note: "), errors


# what bad input gets


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--text", "a", "--file", "none.png"], 2, "flowbridge: --file: cannot read none.png: No such file or direc"),
        (["--file", "a.txt", "--title", "b"], 1, "--title: needs a text: give text, markdown or html, too"),
        (["--html", "<script>x</script>"], 1, "--html: holds nothing that a room could show"),
        (["--file", "page.png"], 1, "--file page.png: is not image/png but a web page, perhaps a login or an error"),
    ],
)
def test_what_cannot_be_said_is_told_and_nothing_is_sent(
    upstream: Upstream, rooms: Homeserver, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    """More of them: tests/unit/cli/test_say.py."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "page.png").write_text("<!doctype html>")
    found, printed, errors = send(upstream, *arguments)
    assert (found, printed) == (code, "")
    assert errors.startswith(sentence), errors
    assert (upstream.events, rooms.uploads) == ([], 0)


def test_text_that_is_not_utf8_is_told(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"gr\xfcn")
    with (tmp_path / "latin").open("rb") as file:
        done = piped(upstream, stdin=file)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"flowbridge: standard input: the text is not utf-8: byte 2 is wrong\n"
