"""Each form in which the body of a message may come."""

import json
from typing import Any

import pytest

from flowbridge.errors import BadContent, BadRequest, NotJson, UnsupportedMedia
from flowbridge.events import message_body

FORM = "application/x-www-form-urlencoded"  # what curl calls everything
JSON = "application/json"
PLAIN = "text/plain"


@pytest.mark.parametrize("type_", ["", FORM, JSON, PLAIN, "application/octet-stream", "application/xml", "nonsense"])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"backup done", {"text": "backup done"}),
        (b"backup done\n", {"text": "backup done"}),
        (b"\xef\xbb\xbfbackup", {"text": "backup"}),
        ("Grüße, 100 % & mehr".encode(), {"text": "Grüße, 100 % & mehr"}),
        (b"a=b", {"text": "a=b"}),
        (b"x=1&text=2", {"text": "x=1&text=2"}),
        (b"[backup] done", {"text": "[backup] done"}),
        (b"[1, 2]", {"text": "[1, 2]"}),
        (b"42", {"text": "42"}),
        (b"null", {"text": "null"}),
        (b'"quoted" and more', {"text": '"quoted" and more'}),
        (b"<b>x</b>", {"text": "<b>x</b>"}),
        (b'{"text": "hi"}', {"text": "hi"}),
        (b' {"markdown": "*hi*", "title": null}', {"markdown": "*hi*", "title": None}),
        (b'{"payload": "hi", "topic": 1.5, "_msgid": "m"}', {"text": "hi"}),
        (b'{"payload": {"html": "x"}, "req": {}}', {"html": "x"}),
    ],
)
def test_body_is_read_whatever_its_type(type_: str, body: bytes, expected: dict[str, Any]) -> None:
    assert message_body.read(body, type_) == expected


def test_json_string_is_a_text_unless_it_is_plain() -> None:
    assert message_body.read(b'"hi\\n"', JSON) == {"text": "hi\n"}
    assert message_body.read(b'"hi\\n"', PLAIN) == {"text": '"hi\\n"'}


def test_broken_json_is_a_text_only_where_it_is_plain() -> None:
    with pytest.raises(NotJson, match="at line 1 column 10"):
        message_body.read(b'{"text": ', JSON)
    assert message_body.read(b'{"text": ', PLAIN) == {"text": '{"text": '}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"text=hi+there&title=T%20t", {"text": "hi there", "title": "T t"}),
        (b"markdown=*x*&title=&mentions=@a:hs&mentions=@b:hs", {"markdown": "*x*", "mentions": "@a:hs,@b:hs"}),
        (b"text=", {"text": ""}),
        (b"key=value", {"key": "value"}),
    ],
)
def test_form_whose_names_are_all_known_is_a_form(body: bytes, expected: dict[str, Any]) -> None:
    assert message_body.read(body, f"{FORM}; charset=UTF-8") == expected


def test_field_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BadContent, match="is there twice at /text"):
        message_body.read(b"text=a&text=b", FORM)
    with pytest.raises(BadContent, match="is there twice at /title"):
        message_body.read(b"x", "", [("title", "a"), ("title", "b")])


def test_fields_of_a_form_with_files_are_read() -> None:
    fields = [("text", "Grüße\r\nan alle"), ("title", "T"), ("key", "")]
    assert message_body.read_form(fields) == {"text": "Grüße\r\nan alle", "title": "T"}
    with pytest.raises(BadContent, match=r"is unknown here: known are text, .* at /colour"):
        message_body.read_form([("text", "x"), ("colour", "red")])
    with pytest.raises(BadContent, match="is given in the query, too at /title"):
        message_body.read_form(fields, [("title", "U")])


def test_query_says_what_a_text_is() -> None:
    given = [("format", "markdown"), ("title", "T"), ("key", "k")]
    assert message_body.read(b"*x*", "", given) == {"markdown": "*x*", "title": "T", "key": "k"}
    assert message_body.read(b'{"payload": "*x*"}', "", given) == {"markdown": "*x*", "title": "T", "key": "k"}
    assert message_body.read(b'{"text": "x"}', "", [("key", "k")]) == {"text": "x", "key": "k"}


@pytest.mark.parametrize(
    ("body", "given", "sentence"),
    [
        (b"x", [("format", "rtf")], "format: must be text, markdown or html, not 'rtf'"),
        (
            b'{"text": "x"}',
            [("format", "markdown")],
            "format: it is for a body that is a text. Name the text `markdown` or `html` in the object",
        ),
        (b'{"text": "x", "title": "T"}', [("title", "U")], "message: is given in the query, too at /title"),
        (b"", [("title", "T")], 'the body is empty: send the text, or a JSON object like {"text": "hello"}'),
        (b" \n", [], 'the body is empty: send the text, or a JSON object like {"text": "hello"}'),
        (b'{"payload": 5}', [], "message: must be the text, or a message object at /payload"),
        (b'{"payload": "a", "payload": "b"}', [], "json: is there twice at /payload"),
        (b'{"text": 1.5}', [], "json: 1.5 is not an integer: Matrix events hold no fractions or exponents at /text"),
        (b'{"text": "\\ud800"}', [], "json: holds a lone surrogate, which is not Unicode text at /text"),
        (b"\xff", [], "the text is not utf-8: byte 0 is wrong"),
    ],
)
def test_body_that_is_wrong_is_refused(body: bytes, given: list[tuple[str, str]], sentence: str) -> None:
    with pytest.raises(BadRequest) as found:
        message_body.read(body, "", given)
    assert found.value.error == sentence


def test_unknown_charset_is_refused() -> None:
    with pytest.raises(UnsupportedMedia, match="the charset 'utf-16' is not supported: send UTF-8"):
        message_body.read(b"x", "text/plain; charset=utf-16")


def test_object_is_read() -> None:
    assert message_body.read_object(json.dumps({"payload": {"target": "$e"}, "topic": 1}).encode()) == {"target": "$e"}
    for body, sentence in (
        (b"", "the body is empty: send a JSON object"),
        (b"[]", "message: must be a JSON object"),
        (b'{"payload": "x"}', "message: must be a JSON object"),
    ):
        with pytest.raises(BadRequest) as found:
            message_body.read_object(body)
        assert found.value.error == sentence
