"""Messages as people write them, and the events that rooms hold (specification, "Instant Messaging")."""

from typing import Any

import pytest

from flowbridge.events import message, shaping
from flowbridge.events.relations import LONGEST_ID, Binding, Found, Target, bind, largest
from flowbridge.events.shaping import Shaped
from flowbridge.models import Rendered

HTML = {"format": "org.matrix.custom.html"}
PILL = '<a href="https://matrix.to/#/@al:hs">@al:hs</a>'


def shaped(value: dict[str, Any], rendered: Rendered | None = None) -> list[Shaped]:
    return shaping.shape(message.read(value), rendered)


@pytest.mark.parametrize(
    ("value", "rendered", "expected"),
    [
        ({"text": "a <b> & c"}, None, {"body": "a <b> & c"}),
        ({"text": "x", "msgtype": "m.emote"}, None, {"body": "x", "msgtype": "m.emote"}),
        (
            {"text": "a <b>\nc", "title": "T & t"},
            None,
            {**HTML, "body": "T & t\na <b>\nc", "formatted_body": "<strong>T &amp; t</strong><br>a &lt;b&gt;<br>c"},
        ),
        (
            {"text": "hi @al:hs!", "mentions": ["@al:hs", "@bo:hs", "@room"]},
            None,
            {
                **HTML,
                "body": "hi @al:hs!",
                "formatted_body": f"hi {PILL}!",
                "m.mentions": {"user_ids": ["@al:hs", "@bo:hs"], "room": True},
            },
        ),
        ({"text": "hi", "mentions": ["@al:hs"]}, None, {"body": "hi", "m.mentions": {"user_ids": ["@al:hs"]}}),
        ({"text": "hi @room"}, None, {"body": "hi @room"}),
        (
            {"markdown": "*x*"},
            Rendered("*x*", "<em>x</em>"),
            {**HTML, "body": "*x*", "formatted_body": "<em>x</em>"},
        ),
        ({"markdown": "x"}, Rendered("x"), {"body": "x"}),
        (
            {"markdown": "x", "title": "T"},
            Rendered("x"),
            {**HTML, "body": "T\nx", "formatted_body": "<strong>T</strong><br>x"},
        ),
        (
            {"markdown": "- x", "title": "T"},
            Rendered("- x", "<ul>\n<li>x</li>\n</ul>"),
            {**HTML, "body": "T\n- x", "formatted_body": "<p><strong>T</strong></p><ul>\n<li>x</li>\n</ul>"},
        ),
        (
            {"text": "x", "reply_to": "$r"},
            None,
            {"body": "x", "m.relates_to": {"m.in_reply_to": {"event_id": "$r"}}},
        ),
        (
            {"text": "x", "thread": "$t"},
            None,
            {
                "body": "x",
                "m.relates_to": {
                    "rel_type": "m.thread",
                    "event_id": "$t",
                    "is_falling_back": True,
                    "m.in_reply_to": {"event_id": "$t"},
                },
            },
        ),
        (
            {"text": "x", "thread": "$t", "reply_to": "$r"},
            None,
            {
                "body": "x",
                "m.relates_to": {
                    "rel_type": "m.thread",
                    "event_id": "$t",
                    "is_falling_back": False,
                    "m.in_reply_to": {"event_id": "$r"},
                },
            },
        ),
        (
            {"markdown": "*x* @al:hs", "edit": "$e", "mentions": ["@al:hs"]},
            Rendered("*x*", "<em>x</em>"),
            {
                **HTML,
                "body": "* *x*",
                "formatted_body": "* <em>x</em>",
                "m.new_content": {
                    **HTML,
                    "msgtype": "m.text",
                    "body": "*x*",
                    "formatted_body": "<em>x</em>",
                    "m.mentions": {"user_ids": ["@al:hs"]},
                },
                "m.relates_to": {"rel_type": "m.replace", "event_id": "$e"},
            },
        ),
    ],
)
def test_text_is_one_event(value: dict[str, Any], rendered: Rendered | None, expected: dict[str, Any]) -> None:
    (event,) = shaped(value, rendered)
    assert event.type == "m.room.message"
    assert event.content == {"msgtype": "m.text", "m.mentions": {}, **expected}
    assert not event.binding.is_open


@pytest.mark.parametrize(
    ("mimetype", "msgtype"),
    [("image/png", "m.image"), ("audio/ogg", "m.audio"), ("video/mp4", "m.video"), ("text/plain", "m.file")],
)
def test_attachment_is_of_its_kind(mimetype: str, msgtype: str) -> None:
    (event,) = shaped({"attachments": [{"content_uri": "mxc://hs/a", "filename": "f", "mimetype": mimetype}]})
    assert event.content == {
        "msgtype": msgtype,
        "body": "f",
        "filename": "f",
        "url": "mxc://hs/a",
        "info": {"mimetype": mimetype},
        "m.mentions": {},
    }


def test_attachments_follow_the_text_in_order() -> None:
    files = [{"content_uri": f"mxc://hs/{n}", "filename": f"{n}.png", "caption": f"the {n}"} for n in range(3)]
    events = shaped({"text": "see", "attachments": files, "thread": "$t", "reply_to": "$r", "key": "k"})
    assert [event.content["body"] for event in events] == ["see", "the 0", "the 1", "the 2"]
    assert events[0].binding == Binding(Target("event", "$r"), Target("event", "$t"), key="k")
    for event in events[1:]:  # the thread holds for all, the reply and the key for the first
        assert event.content["m.relates_to"]["event_id"] == "$t"
        assert event.content["m.relates_to"]["is_falling_back"] is True
        assert event.binding == Binding()


def test_targets_that_are_no_event_ids_are_bound_later() -> None:
    (event,) = shaped({"text": "x", "thread": "key:k", "reply_to": "$r"})
    assert event.content == {"msgtype": "m.text", "body": "x", "m.mentions": {}}
    assert event.binding == Binding(Target("event", "$r"), Target("key", "k"))
    assert Binding.from_json(event.binding.to_json()) == event.binding


TEXT = {"msgtype": "m.text", "body": "x", "m.mentions": {}}
IN_THREAD = {"m.relates_to": {"rel_type": "m.thread", "event_id": "$root"}}
IS_EDIT = {"m.relates_to": {"rel_type": "m.replace", "event_id": "$first"}}
K, D, E = Target("key", "k"), Target("delivery", "d"), Target("event", "$e")


def relation(content: dict[str, Any]) -> Any:
    return content.get("m.relates_to")


@pytest.mark.parametrize(
    ("binding", "found", "expected"),
    [
        (Binding(reply_to=D), Found("$d"), {"m.in_reply_to": {"event_id": "$d"}}),
        (Binding(reply_to=D), Found("$d", IS_EDIT), {"m.in_reply_to": {"event_id": "$first"}}),
        (Binding(edit=D), Found("$d", IS_EDIT), {"rel_type": "m.replace", "event_id": "$first"}),
        (Binding(edit=D), Found("$d", IN_THREAD), {"rel_type": "m.replace", "event_id": "$d"}),
        (Binding(key="k"), Found("$d"), {"rel_type": "m.replace", "event_id": "$d"}),
        (Binding(key="k", on_update="reply"), Found("$d"), {"m.in_reply_to": {"event_id": "$d"}}),
        (Binding(key="k", on_update="new"), Found("$d"), None),
        (Binding(key="k"), "key:k is not known", None),
        (Binding(key="k", reply_to=E), "key:k is not known", {"m.in_reply_to": {"event_id": "$e"}}),
        *(
            (
                binding,
                Found("$d", content),
                {
                    "rel_type": "m.thread",
                    "event_id": root,
                    "is_falling_back": True,
                    "m.in_reply_to": {"event_id": root},
                },
            )
            for binding in (Binding(thread=D), Binding(key="k", on_update="thread"))
            for content, root in ((None, "$d"), (IN_THREAD, "$root"), (IS_EDIT, "$first"))
        ),
    ],
)
def test_binding_becomes_a_relation(binding: Binding, found: Found | str, expected: Any) -> None:
    bound = bind(TEXT, binding, lambda target: Found(target.name) if target.kind == "event" else found)
    assert relation(bound.content) == expected
    assert bound.notes == ()


@pytest.mark.parametrize("name", ["reply_to", "thread", "edit"])
def test_message_whose_target_is_not_there_is_sent_by_itself(name: str) -> None:
    binding = Binding(**{name: D})  # type: ignore[arg-type]
    bound = bind(TEXT, binding, lambda target: f"{target} was not sent")
    assert bound.content == TEXT
    assert bound.notes == (f"{name}: d was not sent: sent as a new message",)
    assert not bound.missing


def test_reaction_and_redaction_are_nothing_without_their_target() -> None:
    for event in (
        shaping.react(message.read_reaction({"target": "d", "key": "👍"})),
        shaping.redact(message.read_redaction({"target": "d"})),
    ):
        bound = bind(event.content, event.binding, lambda target: f"{target} was not sent")
        assert bound.missing == "target: d was not sent"


def test_reaction_goes_to_the_message_and_not_to_its_edit() -> None:
    event = shaping.react(message.read_reaction({"target": "d", "key": "👍"}))
    bound = bind(event.content, event.binding, lambda _: Found("$d", IS_EDIT))
    assert bound.content == {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$first", "key": "👍"}}
    at_once = shaping.react(message.read_reaction({"target": "$e", "key": "👍"}))
    assert relation(at_once.content)["event_id"] == "$e"


def test_redaction_names_its_event_and_reason() -> None:
    event = shaping.redact(message.read_redaction({"target": "$e", "reason": "why"}))
    assert (event.type, event.content) == ("m.room.redaction", {"redacts": "$e", "reason": "why"})
    assert shaping.redact(message.read_redaction({"target": "$e"})).content == {"redacts": "$e"}


@pytest.mark.parametrize(
    ("binding", "times"),
    [
        (Binding(), 1),
        (Binding(reply_to=D), 1),
        (Binding(edit=D), 2),
        (Binding(key="k"), 2),
        (Binding(key="k", on_update="new"), 1),
        (Binding(key="k", on_update="thread"), 1),
    ],
)
def test_largest_content_holds_the_text_as_often_as_it_may_have_to(binding: Binding, times: int) -> None:
    content = str(largest({**TEXT, "body": "needle"}, binding))
    assert content.count("needle") == times
    assert (LONGEST_ID in content) == (binding not in (Binding(), Binding(key="k", on_update="new")))


def test_text_that_is_too_long_is_cut_at_a_line() -> None:
    long = message.read({"text": "".join(f"line {n}\n" for n in range(9_000)), "title": "T"})
    cut = shaping.cut(long).source
    lines = cut.split("\n")
    assert len(cut.encode()) < 4_200
    assert lines[-1] == "… (cut here: the file below has all of it)"
    assert lines[:-1] == [f"line {n}" for n in range(len(lines) - 1)]
    umlauts = shaping.cut(message.read({"markdown": "ü" * 9_000})).source
    assert umlauts == "ü" * 2_048 + "\n\n… (cut here: the file below has all of it)"
