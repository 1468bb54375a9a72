"""The options of `flowbridge send` that make a message, and what is wrong with them."""

import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowbridge.cli import Usage, files, say
from flowbridge.cli.main import app
from flowbridge.errors import TooLarge


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Piped:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ACCESS_TOKEN", "bot")


@pytest.mark.parametrize(
    ("given", "reads", "value"),
    [
        ({"text": "a", "title": None, "mentions": []}, False, {"text": "a"}),
        ({"markdown": "a", "mentions": ["@a:b"]}, False, {"markdown": "a", "mentions": ["@a:b"]}),
        ({"html": "-", "key": "k"}, False, {"html": "piped", "key": "k"}),
        ({"title": "T"}, False, {"text": "piped", "title": "T"}),
        ({"title": "T"}, True, {"text": "piped", "title": "T"}),
        ({"text": ""}, False, {"text": ""}),
    ],
)
def test_options_make_a_message(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], reads: bool, value: dict[str, Any]
) -> None:
    monkeypatch.setattr("sys.stdin", Piped(b"\xef\xbb\xbfpiped\r\n"))
    assert say.said(given, files=False, reads=reads) == value


def test_file_alone_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Piped(b"not for us"))
    assert say.said({}, files=True, reads=False) == {}
    assert say.said({}, files=True, reads=True) == {"text": "not for us"}


def test_nothing_to_say_on_a_terminal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of waiting for what nobody knows to type."""
    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(Usage, match="there is nothing to say: give --text, --markdown, --html or --file, or pipe"):
        say.said({"title": "T"}, files=False, reads=False)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--text", "a", "--html", "b"], 2, "--html: there is --text already, and a message has one text"),
        (["-", "--text", "a"], 2, "- is the text on standard input, and --text another one: a message has one text"),
        ([], 2, "standard input is empty: there is nothing to say"),
        (["--markdown", "-"], 2, "standard input is empty: there is nothing to say"),
        (["--text", "a", "--file", "none.png"], 2, "--file: cannot read none.png: No such file or directory"),
        (["--file", "."], 2, "--file: . is a folder: pack it, and send the archive"),
        (["--file", "empty"], 2, "--file: empty is empty"),
        (["--text", "a", "--caption", "b"], 2, "--caption: there are more captions than files"),
        (["--notice", "--msgtype", "m.emote", "--text", "a"], 2, "--notice is short for --msgtype m.notice, and"),
        (["m.room.topic", "{}", "--text", "a"], 2, "m.room.topic is the type of a whole event, and the options make"),
        (["--text", "a", "--idempotency-key", ""], 2, "the --idempotency-key is empty"),
        (["--text", ""], 1, "--text: is empty"),
        (["--text", "a", "--mention", "alice"], 1, "--mention: is no user id: write it as @name:server, or @room"),
        (["--text", "a", "--reply-to", "x y"], 1, "--reply-to: is no target: give an event id ($…), the id of a"),
        (["--text", "a", "--on-update", "edit"], 1, "--on-update: means nothing without a key: give one, too"),
        (["--text", "a", "--edit", "$e", "--file", "a.txt"], 1, "--file: cannot stand beside edit: an edit changes"),
        (["--text", "a", "--msgtype", "m.image"], 1, "--msgtype: must be m.text, m.notice or m.emote, not 'm.image'"),
        (["--text", "a", "--overflow", "cut"], 1, "--overflow: must be file, not 'cut'"),
        (["--file", "a.txt", "--title", "b"], 1, "--title: needs a text: give text, markdown or html, too"),
        (
            ["--markdown", "x" * 16_385],
            1,
            "M_TOO_LARGE: markdown: it is 16385 bytes long, and at most 16384 are rendered",
        ),
    ],
)
def test_bad_options_are_told(tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "a.txt").write_text("a")
    result = CliRunner().invoke(app, ["send", "!room:upstream", *arguments])
    if code == 2:
        assert isinstance(result.exception, Usage)  # of which `main` makes a line and the exit code
        assert str(result.exception).startswith(sentence)
    else:
        assert result.exit_code == code
        assert result.stderr.startswith(sentence)
    assert result.stdout == ""


def test_captions_go_with_the_first_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.csv"):
        (tmp_path / name).write_text("x")
    found = files.named([Path("a.png"), Path("b.csv")], ["A"])
    assert [(str(file.path), file.caption) for file in found] == [("a.png", "A"), ("b.csv", "")]


async def test_copy_says_what_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x" * 300_000)
    async with files.copies(files.named([Path("a.png")], ["A"]), 300_000) as (copy,):
        assert (copy.label.filename, copy.label.content_type, copy.caption) == ("a.png", "image/png", "A")
        assert copy.sha256 == hashlib.sha256(b"x" * 300_000).hexdigest()
        assert await copy.spool.read() == b"x" * 300_000


async def test_named_pipe_is_read_once(tmp_path: Path) -> None:
    """To look into it beforehand would end its writer."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = files.named([pipe], [])
    writer = threading.Thread(target=pipe.write_bytes, args=(b"lines",))
    writer.start()
    async with files.copies(found, 100) as (copy,):
        assert await copy.spool.read() == b"lines"
    writer.join()


async def test_file_that_is_too_large_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"xx")
    with pytest.raises(TooLarge, match=r"a\.bin: the file is too large: at most 1 bytes may be uploaded"):
        async with files.copies(files.named([Path("a.bin")], []), 1):
            pass
