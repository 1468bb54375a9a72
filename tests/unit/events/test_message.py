"""What a message object may hold, and every sentence that it gets when it holds something else."""

from typing import Any

import pytest

from flowbridge.errors import BadContent
from flowbridge.events import message
from flowbridge.events.message import Attachment, Message
from flowbridge.events.relations import Target

MXC = "mxc://hs/abc"


def problems(value: dict[str, Any]) -> dict[str, str]:
    """By pointer."""
    with pytest.raises(BadContent) as found:
        message.read(value)
    assert {problem.schema for problem in found.value.problems} == {"message"}
    return {problem.pointer: problem.message for problem in found.value.problems}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": "hi"}, Message(source="hi")),
        ({"markdown": "*hi*"}, Message("markdown", "*hi*")),
        ({"html": "<b>hi</b>", "title": " T "}, Message("html", "<b>hi</b>", "T")),
        ({"text": "hi", "msgtype": "m.notice", "title": None}, Message(source="hi", msgtype="m.notice")),
        (
            {"text": "hi", "mentions": ["@a:hs", "@a:hs", "@room"]},
            Message(source="hi", users=("@a:hs",), mentions_room=True),
        ),
        ({"text": "hi", "mentions": "@a:hs, @b:hs:8448"}, Message(source="hi", users=("@a:hs", "@b:hs:8448"))),
        ({"text": "hi", "reply_to": "$e"}, Message(source="hi", reply_to=Target("event", "$e"))),
        ({"text": "hi", "thread": "key:build 1"}, Message(source="hi", thread=Target("key", "build 1"))),
        ({"text": "hi", "edit": "Abc-_1f.2"}, Message(source="hi", edit=Target("delivery", "Abc-_1f.2"))),
        ({"text": "hi", "key": "k", "on_update": "reply"}, Message(source="hi", key="k", on_update="reply")),
        ({"text": "hi", "overflow": "file"}, Message(source="hi", overflow="file")),
        (
            {"attachments": [{"content_uri": MXC, "filename": "a.png", "caption": "A"}]},
            Message(attachments=(Attachment(MXC, "a.png", "image/png", "A"),)),
        ),
        (
            {"attachments": [{"content_uri": MXC, "mimetype": "text/plain"}]},
            Message(attachments=(Attachment(MXC, "file.txt", "text/plain"),)),
        ),
        (
            {"attachments": [{"content_uri": MXC}]},
            Message(attachments=(Attachment(MXC, "file.bin", "application/octet-stream"),)),
        ),
        (
            {"attachments": [{"content_uri": MXC, "info": {"mimetype": "image/png", "size": 9, "w": 4, "h": 3}}]},
            Message(attachments=(Attachment(MXC, "file.png", "image/png", "", {"size": 9, "w": 4, "h": 3}),)),
        ),
        (
            {"attachments": [{"content_uri": MXC, "mimetype": "text/plain", "info": {"mimetype": "image/png"}}]},
            Message(attachments=(Attachment(MXC, "file.txt", "text/plain", "", {}),)),
        ),
    ],
)
def test_message_is_read(value: dict[str, Any], expected: Message) -> None:
    assert message.read(value) == expected


TARGET = "is no target: give an event id ($…), the id of a delivery, or key:NAME"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, {"": "has nothing to say: give text, markdown or html"}),
        ({"attachments": []}, {"": "has nothing to say: give text, markdown or html"}),
        ({"text": "  "}, {"/text": "is empty"}),
        ({"text": 1}, {"/text": "must be a string"}),
        ({"text": "a\0"}, {"/text": "holds a NUL character, which homeservers cannot store"}),
        (
            {"text": "a", "html": "b"},
            {"/html": "is one too many: there is text already, and a message has one text"},
        ),
        ({"txt": "a", "text": "a"}, {"/txt": "is unknown here: did you mean text?"}),
        (
            {"x~/y": "a", "text": "a"},
            {"/x~0~1y": f"is unknown here: known are {', '.join(message.KEYS)}"},
        ),
        ({"text": "a", "title": "a\nb"}, {"/title": "is one line: put the rest into the text"}),
        ({"text": "a", "title": "a" * 501}, {"/title": "is longer than 500 characters: put the rest into the text"}),
        ({"text": "a", "msgtype": "m.txt"}, {"/msgtype": "must be m.text, m.notice or m.emote, not 'm.txt'"}),
        ({"text": "a", "msgtype": ["m.text"]}, {"/msgtype": "must be m.text, m.notice or m.emote"}),
        ({"text": "a", "mentions": 7}, {"/mentions": "must be a list of user ids (@name:server) and @room"}),
        (
            {"text": "a", "mentions": ["@a:hs", "alice", 3, "@a b:hs"]},
            {f"/mentions/{n}": "is no user id: write it as @name:server, or @room" for n in (1, 2, 3)},
        ),
        (
            {"text": "a", "mentions": ["@room"] * 51},
            {"/mentions": "are more than 50: @room is for everybody in the room"},
        ),
        (
            {"text": "a", "mentions": ["@" + "a" * 300 + ":hs"]},
            {"/mentions/0": "is no user id: write it as @name:server, or @room"},
        ),
        *(
            ({"text": "a", "reply_to": bad}, {"/reply_to": TARGET})
            for bad in ("", "$", "key:", "a b", "!r:hs", 1, ["$a"])
        ),
        ({"text": "a", "thread": "$" + "x" * 255}, {"/thread": TARGET}),
        ({"text": "a", "edit": "key:" + "x" * 256}, {"/edit": TARGET}),
        ({"text": "a", "key": ""}, {"/key": "is empty: omit it, or give what the message is about"}),
        ({"text": "a", "key": "x" * 10_000}, {"/key": "must be at most 255 bytes, without control characters"}),
        ({"text": "a", "key": "a\nb"}, {"/key": "must be at most 255 bytes, without control characters"}),
        ({"text": "a", "on_update": "edit"}, {"/on_update": "means nothing without a key: give one, too"}),
        (
            {"text": "a", "key": "k", "on_update": "replace"},
            {"/on_update": "must be edit, thread, reply or new, not 'replace'"},
        ),
        ({"text": "a", "overflow": "cut"}, {"/overflow": "must be file, not 'cut'"}),
        (
            {"text": "a", "edit": "$e", "thread": "$t", "reply_to": "$r"},
            {
                f"/{name}": "cannot stand beside edit: an edited message stays where it is"
                for name in ("reply_to", "thread")
            },
        ),
        (
            {"text": "a", "edit": "$e", "attachments": [{"content_uri": MXC}]},
            {"/attachments": "cannot stand beside edit: an edit changes a text. Send them by themselves"},
        ),
        (
            {"text": "a", "edit": "$e", "key": "k"},
            {"/key": "cannot stand beside edit: a key edits the message that it stands for by itself"},
        ),
        (
            {"attachments": [{"content_uri": MXC}], "title": "T"},
            {"/title": "needs a text: give text, markdown or html, too"},
        ),
        ({"text": "a", "attachments": {}}, {"/attachments": "must be a list of objects"}),
        ({"text": "a", "attachments": ["x"]}, {"/attachments/0": "must be an object"}),
        (
            {"text": "a", "attachments": [{"url": "file:///etc/passwd"}, {"data": "aGk=", "url": "http://x/"}]},
            {
                "/attachments/0/url": "is no address of a file on the web: https://… or http://…",
                "/attachments/1/data": "is one too many: there is url already, and a file has one source",
            },
        ),
        (
            {"text": "a", "attachments": [{}]},
            {
                "/attachments/0": "is no file: give its url, its data (base64), or the content_uri that POST /media "
                "answers"
            },
        ),
        (
            {
                "attachments": [
                    {"content_uri": MXC, "info": {"mimetype": "png", "size": -1, "w": 1.5, "h": True, "x": 1}}
                ]
            },
            {
                "/attachments/0/info/mimetype": "is no media type: write it as image/png",
                "/attachments/0/info/size": "must be a whole number, not below 0",
                "/attachments/0/info/w": "must be a whole number, not below 0",
                "/attachments/0/info/h": "must be a whole number, not below 0",
                "/attachments/0/info/x": "is unknown here: known are mimetype, size, w, h, duration",
            },
        ),
        (
            {"attachments": [{"content_uri": MXC, "info": [1]}, {"url": "https://hs/x", "info": {"w": 1}}]},
            {
                "/attachments/0/info": "must be an object, as POST /media answers it",
                "/attachments/1/info": "stands beside content_uri alone: of any other file it is found out",
            },
        ),
        (
            {"text": "a", "attachments": [{"content_uri": "https://hs/x"}]},
            {"/attachments/0/content_uri": "is no address of a file at a homeserver: mxc://server/id"},
        ),
        (
            {"text": "a", "attachments": [{"content_uri": MXC, "filename": "a\nb", "mimetype": "png"}]},
            {
                "/attachments/0/filename": "must be at most 255 bytes, without control characters",
                "/attachments/0/mimetype": "is no media type: write it as image/png",
            },
        ),
        (
            {"text": "a", "attachments": [{"content_uri": MXC}] * 21},
            {"/attachments": "are more than 20: send the others with another message"},
        ),
        (
            {"text": 1, "mentions": 1, "edit": 1, "msgtype": 1, "color": "red"},
            {
                "/color": f"is unknown here: known are {', '.join(message.KEYS)}",
                "/text": "must be a string",
                "/mentions": "must be a list of user ids (@name:server) and @room",
                "/msgtype": "must be m.text, m.notice or m.emote",
                "/edit": TARGET,
            },
        ),
    ],
)
def test_each_problem_has_its_pointer_and_sentence(value: dict[str, Any], expected: dict[str, str]) -> None:
    assert problems(value) == expected


def test_problems_are_bounded() -> None:
    with pytest.raises(BadContent) as found:
        message.read({f"unknown {number}": 1 for number in range(5_000)})
    assert len(found.value.problems) <= 100


def test_reaction_is_read() -> None:
    family = "👨‍👩‍👧"  # joined by characters that are not printable
    assert message.read_reaction({"target": "$e", "key": family}).key == family
    with pytest.raises(BadContent) as found:
        message.read_reaction({"key": "x" * 300, "emoji": "x"})
    assert {problem.pointer: problem.message for problem in found.value.problems} == {
        "/emoji": "is unknown here: known are target, key",
        "/target": "is required: give an event id ($…), the id of a delivery, or key:NAME",
        "/key": "is what to react with, for instance ✅, in at most 255 bytes",
    }


def test_redaction_is_read() -> None:
    assert message.read_redaction({"target": "key:x", "reason": "wrong room"}).reason == "wrong room"
    with pytest.raises(BadContent) as found:
        message.read_redaction({"target": 5, "reason": 5})
    assert {problem.pointer: problem.message for problem in found.value.problems} == {
        "/target": TARGET,
        "/reason": "must be a string",
    }
