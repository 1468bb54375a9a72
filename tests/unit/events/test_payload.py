"""flowbridge.events.payload: the shapes a body may have."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbridge.errors import BadContent, MatrixError, NotJson, UnsupportedMedia
from flowbridge.events import Catalogue, built_in, payload
from flowbridge.models import Payload, Surface

CATALOGUE = Catalogue.load()
MESSAGE = "m.room.message"
TEXT = {"msgtype": "m.text", "body": "hi"}
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"
BOTH: tuple[Surface, ...] = ("flow", "matrix")


def read(body: Any, event_type: str = MESSAGE, content_type: str = JSON, surface: Surface = "flow") -> Payload:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return payload.read(raw, content_type, event_type, CATALOGUE.required, surface)


def pointers(body: Any, event_type: str = MESSAGE, content_type: str = JSON, surface: Surface = "flow") -> list[str]:
    with pytest.raises(BadContent) as caught:
        read(body, event_type, content_type, surface)
    return [problem.pointer for problem in caught.value.problems]


def seed_events() -> list[dict[str, Any]]:
    events = [json.loads(path.read_bytes()) for path in sorted((built_in() / "examples").glob("*.json"))]
    return [event for event in events if event["$comment"].startswith("seed")]


# 1. the content


@pytest.mark.parametrize("surface", BOTH)
@pytest.mark.parametrize(
    "content_type", [JSON, "", FORM, "text/plain", "application/octet-stream", "nonsense", "text/xml"]
)
def test_json_object_is_the_content_whatever_its_label(content_type: str, surface: Surface) -> None:
    assert read(TEXT, content_type=content_type, surface=surface) == Payload(TEXT)


@pytest.mark.parametrize("surface", BOTH)
def test_empty_object_is_content(surface: Surface) -> None:
    assert read({}, "m.room.avatar", surface=surface) == Payload({})


# 2. flow messages


@pytest.mark.parametrize(
    "body",
    [
        {"payload": TEXT},
        {"payload": TEXT, "topic": "alarm"},
        {"payload": TEXT, "topic": "", "_msgid": "a.1"},
        {"payload": TEXT, "_msgid": "a.1", "retain": False, "qos": 0, "parts": {"index": 0}},
        {"payload": {"type": MESSAGE, "content": TEXT}},
    ],
)
def test_flow_message_gives_its_payload(body: Any) -> None:
    assert read(body).content == TEXT


def test_flow_message_with_a_string_is_a_text_message() -> None:
    assert read({"payload": "hi", "topic": "x"}) == Payload(TEXT)


def test_flow_message_for_the_topic_is_told_from_a_topic() -> None:
    flow = {"_msgid": "a.1", "topic": "sensors/door", "payload": {"topic": "Door"}}
    assert read(flow, "m.room.topic").content == {"topic": "Door"}
    assert read({"topic": "Door"}, "m.room.topic").content == {"topic": "Door"}
    assert read({"topic": "Door", "_msgid": "a.1"}, "m.room.topic").content == {"topic": "Door", "_msgid": "a.1"}


@pytest.mark.parametrize(
    ("event_type", "content"),
    [
        (MESSAGE, {**TEXT, "payload": {"a": 1}}),
        (MESSAGE, {**TEXT, "payload": "text", "topic": "x", "_msgid": "y"}),
        ("m.room.name", {"name": "x", "payload": "y"}),
        ("org.example.reading", {"payload": 21, "unit": "°C"}),
    ],
)
def test_content_that_has_a_payload_of_its_own_stays_whole(event_type: str, content: Any) -> None:
    assert read(content, event_type).content == content


def test_flow_message_of_an_unknown_type_gives_its_payload() -> None:
    assert read({"payload": {"celsius": 21}, "topic": "x", "_msgid": "y"}, "org.example.reading").content == {
        "celsius": 21
    }


@pytest.mark.parametrize("value", [None, 1, True, [TEXT]])
def test_flow_message_with_no_object_and_no_string_is_refused_at_payload(value: Any) -> None:
    assert pointers({"payload": value}) == ["/payload"]


def test_flow_message_with_a_string_is_refused_for_other_types() -> None:
    with pytest.raises(BadContent, match=r"m\.room\.name"):
        read({"payload": "hi"}, "m.room.name")


def test_flow_message_is_mere_content_on_the_matrix_surface() -> None:
    assert read({"payload": TEXT}, surface="matrix").content == {"payload": TEXT}


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        ({"payload": "hi", "msgtype": "m.notice"}, ["msgtype"]),
        ({"payload": TEXT, "body": "x", "format": "markdown", "topic": "t"}, ["body", "format"]),
        ({"payload": "hi", "m.mentions": {}, "markdown": "**x**"}, ["m.mentions", "markdown"]),
        ({"payload": "hi", "state_key": "x"}, ["state_key"]),
        ({"payload": "hi", "url": "http://x", "filename": "a", "headers": {}, "_msgid": "1", "req": {}}, []),
        ({"type": MESSAGE, "content": TEXT, "msgtype": "m.notice", "event_id": "$x", "room_id": "!x"}, ["msgtype"]),
        ({"payload": {"type": MESSAGE, "content": TEXT, "text": "x"}, "html": "x"}, ["html", "text"]),
    ],
)
def test_keys_beside_the_content_that_look_like_it_are_named(body: Any, ignored: list[str]) -> None:
    assert read(body) in (
        Payload(TEXT, ignored=tuple(ignored)),
        Payload({**TEXT, "body": "hi"}, ignored=tuple(ignored)),
    )


def test_no_more_than_20_ignored_keys_are_named_and_none_at_length() -> None:
    found = read({"payload": "hi", **{f"m.{number}" + "x" * 1_000: 1 for number in range(100)}})
    assert len(found.ignored) == 20
    assert {len(key) for key in found.ignored} == {255}


def test_what_a_schema_requires_is_named_beside_a_payload_too() -> None:
    required = {"org.example.alert": frozenset({"severity", "summary"})}
    body = json.dumps({"payload": {"summary": "x"}, "severity": 1}).encode()
    found = payload.read(body, "", "org.example.alert", lambda name: required[name], "flow")
    assert found == Payload({"summary": "x"}, ignored=("severity",))


@pytest.mark.parametrize("surface", BOTH)
def test_content_one_level_too_deep_is_refused_at_content(surface: Surface) -> None:
    with pytest.raises(BadContent) as caught:
        read({"content": TEXT}, surface=surface)
    (problem,) = caught.value.problems
    assert problem.pointer == "/content"
    assert problem.message == (
        "is the content of m.room.message, one level too deep: send it by itself, or as a whole event with "
        '"type": "m.room.message" beside it'
    )


def test_content_of_a_type_that_requires_nothing_may_have_a_content_of_its_own() -> None:
    assert read({"content": {"a": 1}}, "org.example.reading") == Payload({"content": {"a": 1}})


# 3. whole events


@pytest.mark.parametrize("surface", BOTH)
@pytest.mark.parametrize("event", seed_events(), ids=lambda event: str(event["type"]))
def test_event_as_the_seeds_print_it_gives_content_and_state_key(event: Any, surface: Surface) -> None:
    expected = Payload(event["content"], event.get("state_key"))
    assert read(event, event["type"], surface=surface) == expected
    if surface == "flow":
        assert read({"payload": event, "_msgid": "a.1"}, event["type"]) == expected


@pytest.mark.parametrize("surface", BOTH)
def test_feedback_has_a_type_of_its_own(surface: Surface) -> None:
    content = {"type": "delivered", "target_event_id": "$x"}
    assert read(content, "m.room.message.feedback", surface=surface) == Payload(content)
    with_content_key = {**content, "content": {}}
    assert read(with_content_key, "m.room.message.feedback", surface=surface) == Payload(with_content_key)


@pytest.mark.parametrize("surface", BOTH)
@pytest.mark.parametrize(
    "event_type", ["m.room.name", "org.example.reading", "m.room.message.feedback", "m.room.server_acl"]
)
def test_event_of_another_type_than_the_path_is_refused_at_type(event_type: str, surface: Surface) -> None:
    assert pointers({"type": MESSAGE, "content": TEXT}, event_type, surface=surface) == ["/type"]


@pytest.mark.parametrize("key", [1, None, [], {"a": 1}])
def test_state_key_that_is_no_string_is_refused_unless_null(key: Any) -> None:
    event = {"type": "m.room.name", "state_key": key, "content": {"name": "x"}}
    if key is None:
        assert read(event, "m.room.name") == Payload({"name": "x"})
    else:
        assert pointers(event, "m.room.name") == ["/state_key"]


@pytest.mark.parametrize("content", ["text", None, [1], 7])
def test_object_with_a_content_that_is_no_object_is_the_content(content: Any) -> None:
    body = {"type": MESSAGE, "content": content}
    assert read(body) == Payload(body)


# 4. bare strings


@pytest.mark.parametrize("text", ["hi", "", "a\nb", "😀", "\0"])
def test_json_string_is_a_text_message(text: str) -> None:
    assert read(text).content == {"msgtype": "m.text", "body": text}


@pytest.mark.parametrize(
    "body", [b"hi", b"it's 5 o'clock", b'{"a": ', b"[1, 2]", b"1.5", b"null", b'"hi"', b"NaN", b"<p>hi</p>"]
)
@pytest.mark.parametrize("content_type", ["text/plain", "Text/Plain; charset=utf-8", 'text/plain;charset="UTF-8"'])
def test_plain_text_that_is_no_json_object_is_a_text_message(body: bytes, content_type: str) -> None:
    assert read(body, content_type=content_type).content == {"msgtype": "m.text", "body": body.decode()}


@pytest.mark.parametrize("body", [b"[" * 65, b"x = [[" * 40, b"log: " + b"{" * 100])
def test_plain_text_with_many_brackets_is_a_text_message_all_the_same(body: bytes) -> None:
    assert read(body, content_type="text/plain").content == {"msgtype": "m.text", "body": body.decode()}


@pytest.mark.parametrize("content_type", ["", FORM, JSON, "application/octet-stream", "nonsense"])
@pytest.mark.parametrize("body", [b"just text", b"Disk 93 % full", b"it's 5 o'clock", b"42", b"1.5", b"true", b"NaN"])
def test_body_that_is_neither_json_nor_a_form_is_a_text_message(body: bytes, content_type: str) -> None:
    assert read(body, content_type=content_type).content == {"msgtype": "m.text", "body": body.decode()}


def test_text_with_an_equals_sign_is_a_text_unless_it_is_called_a_form() -> None:
    assert read(b"a = b", content_type="").content["body"] == "a = b"
    with pytest.raises(UnsupportedMedia):
        read(b"a=b", content_type=FORM)


@pytest.mark.parametrize("content_type", ["", FORM, JSON])
@pytest.mark.parametrize("body", [b'{"msgtype":', b'["a"', b'"hi', b' {"a": 1}}', b'\xef\xbb\xbf{"a":'])
def test_json_that_breaks_off_is_told_the_place(body: bytes, content_type: str) -> None:
    with pytest.raises(NotJson, match=r"line \d+ column \d+"):
        read(body, content_type=content_type)


@pytest.mark.parametrize("content_type", ["text/plain", "", FORM])
def test_mark_of_an_editor_is_no_part_of_a_text(content_type: str) -> None:
    assert read(b"\xef\xbb\xbfhi", content_type=content_type).content["body"] == "hi"


def test_plain_text_that_is_a_json_object_is_content() -> None:
    assert read(TEXT, content_type="text/plain; charset=utf-8") == Payload(TEXT)


@pytest.mark.parametrize("charset", ["iso-8859-1", "ISO-8859-1", "latin1", "windows-1252"])
def test_plain_text_is_read_in_its_charset(charset: str) -> None:
    assert read("Tür".encode("latin-1"), content_type=f"text/plain; charset={charset}").content["body"] == "Tür"


@pytest.mark.parametrize("charset", ["utf-7", "idna", "hex", "base64", "nonsense", "utf-16", "\0"])
def test_plain_text_in_another_charset_is_unsupported(charset: str) -> None:
    with pytest.raises(UnsupportedMedia, match="charset"):
        read(b"hi", content_type=f"text/plain; charset={charset}")


@pytest.mark.parametrize("charset", ["utf-8", "ascii", "windows-1252"])
def test_plain_text_that_is_not_in_its_charset_is_refused(charset: str) -> None:
    with pytest.raises(NotJson, match=charset):
        read(b"\x81\xff", content_type=f"text/plain; charset={charset}")


@pytest.mark.parametrize(("event_type", "surface"), [("m.room.name", "flow"), (MESSAGE, "matrix"), ("org.x", "flow")])
def test_bare_string_is_refused_elsewhere(event_type: str, surface: Surface) -> None:
    assert pointers("hi", event_type, surface=surface) == [""]
    with pytest.raises(NotJson):
        read(b"hi", event_type, "text/plain", surface)


# what is none of them


@pytest.mark.parametrize("surface", BOTH)
@pytest.mark.parametrize("body", [b"null", b"[]", b'[{"body": "hi"}]'])
def test_list_and_null_are_no_content(body: bytes, surface: Surface) -> None:
    assert pointers(body, surface=surface) == [""]


@pytest.mark.parametrize(("event_type", "surface"), [("m.room.name", "flow"), (MESSAGE, "matrix"), ("org.x", "flow")])
@pytest.mark.parametrize("body", [b"1", b"1.5", b"true", b"NaN"])
def test_number_is_no_content_where_there_are_no_texts(body: bytes, event_type: str, surface: Surface) -> None:
    assert pointers(body, event_type, surface=surface) == [""]


@pytest.mark.parametrize("surface", BOTH)
@pytest.mark.parametrize("content_type", [JSON, "text/plain", FORM, ""])
@pytest.mark.parametrize("body", [b"", b" \r\n\t"])
def test_empty_body_is_not_json(body: bytes, content_type: str, surface: Surface) -> None:
    with pytest.raises(NotJson, match="empty"):
        read(body, content_type=content_type, surface=surface)


@pytest.mark.parametrize("surface", BOTH)
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (FORM, b"msgtype=m.text&body=hi"),
        (f"{FORM}; charset=utf-8", b"payload=%7B%7D"),
        ("Multipart/Form-Data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'),
        ("multipart/mixed", b"--x"),
        ("application/xml", b"<a/>"),
        ("text/xml; charset=utf-8", b"<a/>"),
        ("application/soap+xml", b"<a/>"),
    ],
)
def test_real_form_or_xml_is_unsupported_media(content_type: str, body: bytes, surface: Surface) -> None:
    with pytest.raises(UnsupportedMedia) as caught:
        read(body, content_type=content_type, surface=surface)
    assert caught.value.status == 415
    assert caught.value.errcode.startswith("M_")


@pytest.mark.parametrize("surface", BOTH)
def test_broken_json_is_not_json(surface: Surface) -> None:
    with pytest.raises(NotJson, match="line 1 column"):
        read(b'{"body": "hi"', surface=surface)


# the general rules, in what is used


@pytest.mark.parametrize(
    "body",
    [
        b'{"type": "m.room.message", "content": {"a": 1}, "origin_server_ts": 1.5, "unsigned": {"age": 1e400}}',
        b'{"type": "m.room.message", "content": {"a": 1}, "sender": "\\ud800", "\\udc00": NaN}',
        b'{"type": "m.room.message", "content": {"a": 1}, "unsigned": {"k": 1, "k": 2}}',
        b'{"payload": {"a": 1}, "_msgid": 0.5, "parts": {"k": 1, "k": 2}}',
    ],
)
def test_what_is_wrong_outside_the_content_is_ignored(body: bytes) -> None:
    assert read(body).content == {"a": 1}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"a": {"b": [0, 1.5]}}', ["/a/b/1"]),
        (b'{"payload": {"a": {"b": [0, 1.5]}}, "x": 2.5}', ["/a/b/1"]),
        (b'{"type": "m.room.message", "content": {"a/b": NaN, "c": "\\ud800"}, "x": 2.5}', ["/a~1b", "/c"]),
        (b'{"payload": {"type": "m.room.message", "content": {"k": 1, "k": 1}}}', ["/k"]),
    ],
)
def test_what_is_wrong_inside_is_refused_with_a_pointer_into_the_content(body: bytes, expected: list[str]) -> None:
    assert pointers(body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"payload": {"a": 1}, "payload": {"a": 2}}', ["/payload"]),
        (b'{"type": "m.room.message", "content": {"a": 1}, "content": {"a": 2}}', ["/content"]),
        (b'{"type": "m.room.name", "type": "m.room.message", "content": {"a": 1}}', ["/type"]),
    ],
)
def test_envelope_that_says_a_thing_twice_is_refused(body: bytes, expected: list[str]) -> None:
    assert pointers(body) == expected


def test_body_nested_too_deeply_is_refused() -> None:
    assert pointers(b'{"payload": ' + b"[" * 65 + b"]" * 65 + b"}") == [""]


ENVELOPES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["payload", "topic", "_msgid", "type", "content", "state_key", "msgtype", "body", "membership"]),
    st.sampled_from([None, "x", 1.5, 2**60, [], {}, {"body": 1.5}, TEXT, MESSAGE, "\ud800", {"\ud800": 1}, True]),
)
BODIES = st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | ENVELOPES.map(json.dumps).map(str.encode)
LABELS = st.sampled_from(["", JSON, FORM, "text/plain", "multipart/x"]) | st.text(max_size=40).map(
    "text/plain;".__add__
)


@settings(max_examples=200, deadline=None)
@given(BODIES, LABELS, st.sampled_from([MESSAGE, "m.room.topic", "m.room.member", "org.x"]), st.sampled_from(BOTH))
def test_arbitrary_body_raises_nothing_but_a_4xx(body: bytes, label: str, event_type: str, surface: Surface) -> None:
    try:
        found = read(body, event_type, label, surface)
    except MatrixError as caught:
        error = caught
    else:
        assert isinstance(found.content, dict)
        json.dumps(found.content, ensure_ascii=False, allow_nan=False).encode()
        return
    assert 400 <= error.status < 500
    json.dumps(error.body(), ensure_ascii=False).encode()
