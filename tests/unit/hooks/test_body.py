"""Bodies of requests to hooks, in every form in which senders send them."""

import contextlib
import gzip
import json
import time
import tracemalloc
import zlib
from urllib.parse import quote_plus, unquote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.errors import BadRequest, TooLarge, UnsupportedMedia
from flowbridge.hooks import body
from flowbridge.hooks.body import Body

LIMIT = 1024 * 1024
JSON = '{"text": "ü", "n": 1.5, "n": 2}'
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=b"


def read(raw: bytes | str, content_type: str = "", *, limit: int = LIMIT, **headers: str) -> Body:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if content_type:
        given["content-type"] = content_type
    return body.read(raw.encode() if isinstance(raw, str) else raw, given, limit)


def part(name: str, value: str, more: str = "") -> str:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


@pytest.mark.parametrize("type_", ["", "application/json", FORM, "application/octet-stream", "x/y; charset=utf-8", "?"])
def test_json_is_json_under_any_type(type_: str) -> None:
    for raw in (JSON, f"\n {JSON}"):
        assert read(raw, type_) == Body(raw, "json")
    for raw in ("[1]", '"text"'):
        assert read(raw, type_) == Body(raw, "either" if type_ == FORM else "json")
    assert read(b"\xef\xbb\xbf{}", type_) == Body("{}", "json")


@pytest.mark.parametrize("text", ["[FIRING:1] disk full", "[2026-11-30 12:00] done", '"db-1" failed'])
@pytest.mark.parametrize("type_", ["text/plain; charset=utf-8", FORM])
def test_json_that_is_called_a_text_or_sent_by_curl_may_be_one(text: str, type_: str) -> None:
    assert read(text, type_) == Body(text, "either")
    assert read(text, "application/json") == Body(text, "json")


def test_object_that_breaks_off_is_no_text_of_curl() -> None:
    assert read('{"text": "a', FORM) == Body('{"text": "a', "json")  # a 400 with the place


@pytest.mark.parametrize("type_", ["", "text/plain", "application/json", FORM])
@pytest.mark.parametrize("text", ["backup done", "42", "true", "<b>down</b>", "a=b is wrong", "100% of web-1", "-"])
def test_what_is_no_json_is_a_text(text: str, type_: str) -> None:
    assert read(f"{text}\n", type_) == Body(text, "text")


def test_form_holds_its_payload() -> None:
    assert read(urlencode({"payload": JSON}), FORM) == Body(JSON, "json")
    assert read(urlencode({"token": "x", "payload": JSON}), f"{FORM}; charset=utf-8") == Body(JSON, "json")
    assert read(urlencode({"payload": "just text"}), FORM) == Body("just text", "text")
    assert read(urlencode({"payload": '{"text": '}), FORM) == Body('{"text":', "json")  # a 400 with the place


def test_other_form_is_an_object() -> None:
    found = read(urlencode({"text": "a b", "title": "T", "empty": ""}), FORM)
    assert (json.loads(found.text), found.form) == ({"text": "a b", "title": "T", "empty": ""}, "json")
    assert json.loads(read("From=%2B49&Body=hello+there", FORM).text) == {"From": "+49", "Body": "hello there"}


def test_multipart_holds_its_data() -> None:
    assert read(part("data", JSON) + "--b--\r\n", MULTIPART) == Body(JSON, "json")  # Uptime Kuma
    files = part("file", "\x00\xff", '; filename="a.png"')
    assert read(files + part("payload_json", JSON) + "--b--\r\n", MULTIPART) == Body(JSON, "json")  # Discord
    found = read(part("text", "hi") + files + "--b--\r\n", MULTIPART)
    assert json.loads(found.text) == {"text": "hi"}


def test_wrong_bytes_are_replaced() -> None:
    assert read(b'{"text": "\xff\xfe"}') == Body('{"text": "\ufffd\ufffd"}', "json")
    assert read(b"caf\xe9", "text/plain") == Body("caf\ufffd", "text")


@pytest.mark.parametrize(("raw", "type_"), [(b"", ""), (b" \r\n\t", "text/plain"), (b"", "application/xml")])
def test_empty_body_has_nothing_to_say(raw: bytes, type_: str) -> None:
    with pytest.raises(BadRequest, match="the body is empty: there is nothing to say"):
        read(raw, type_)


def test_empty_form_has_nothing_to_say() -> None:
    for raw, type_ in (("payload=", FORM), (part("data", "") + "--b--\r\n", MULTIPART), ("--b--\r\n", MULTIPART)):
        with pytest.raises(BadRequest, match="the form is empty: there is nothing to say"):
            read(raw, type_)


@pytest.mark.parametrize(
    ("raw", "type_"),
    [
        ("<a/>", "application/xml"),
        ("<a/>", "text/xml; charset=x"),
        ("<a/>", "application/soap+xml"),
        ("\n<?xml ?>", ""),
    ],
)
def test_xml_is_not_read(raw: str, type_: str) -> None:
    with pytest.raises(UnsupportedMedia, match="XML is not read here: send JSON, a form with a field `payload`, or a"):
        read(raw, type_)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", " x-gzip "])
def test_gzip_is_unpacked(encoding: str) -> None:
    assert read(gzip.compress(JSON.encode()), content_encoding=encoding) == Body(JSON, "json")
    two = gzip.compress(JSON[:9].encode()) + gzip.compress(JSON[9:].encode()) + b"\0\0"
    assert read(two, content_encoding=encoding) == Body(JSON, "json")
    assert read(JSON, content_encoding="identity") == Body(JSON, "json")


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "x" * 500])
def test_other_encodings_are_not_read(encoding: str) -> None:
    with pytest.raises(UnsupportedMedia, match="is not read: send gzip, or the body as it is"):
        read(JSON, content_encoding=encoding)


def test_bomb_is_unpacked_no_further_than_its_limit() -> None:
    bomb = gzip.compress(b" " * (200 * LIMIT), 9)
    began = time.process_time()
    with pytest.raises(TooLarge, match=f"longer than {LIMIT} bytes when it is unpacked"):
        read(bomb, content_encoding="gzip")
    tiny = gzip.compress(b"")
    with pytest.raises(BadRequest, match="gzip of more than 16 members"):
        read(tiny * (LIMIT // len(tiny)), content_encoding="gzip")
    assert time.process_time() - began < 0.5
    assert read(gzip.compress(b"x" * LIMIT), content_encoding="gzip").text == "x" * LIMIT


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(JSON.encode(), "is not gzip, as Content-Encoding says", id="plain"),
        pytest.param(gzip.compress(JSON.encode())[:-9], "is gzip that breaks off", id="broken-off"),
        pytest.param(zlib.compress(JSON.encode()), "is not gzip, as Content-Encoding says", id="zlib"),
    ],
)
def test_what_is_no_gzip_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(raw, content_encoding="gzip")


def test_malformed_forms_are_refused() -> None:
    for raw, type_ in ((part("data", JSON), MULTIPART), ("x", "multipart/form-data"), ("garbage", MULTIPART)):
        with pytest.raises(BadRequest):
            read(raw, type_)
    with pytest.raises(BadRequest, match="more than 200 parts"):
        read("".join(part(str(number), "x") for number in range(300)) + "--b--\r\n", MULTIPART)
    assert read("&".join(f"a{number}=1" for number in range(5_000)), FORM).form == "text"


@given(
    st.binary(max_size=200),
    st.sampled_from(["", FORM, MULTIPART, "text/plain", "a/b+xml"]),
    st.sampled_from(["", "gzip"]),
)
def test_bytes_of_any_kind_are_read_or_refused(raw: bytes, type_: str, encoding: str) -> None:
    with contextlib.suppress(BadRequest, TooLarge, UnsupportedMedia):
        assert read(raw, type_, content_encoding=encoding).text.strip()


@pytest.mark.parametrize("raw", [b"", b" \n", b"\x1c", "\u2003\u00a0".encode()])
def test_spaces_of_any_kind_are_no_body(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="the body is empty: there is nothing to say"):
        read(raw)


@given(st.text(), st.integers(min_value=4, max_value=64))
def test_form_is_what_it_was_before_it_was_encoded(text: str, piece: int) -> None:
    """Wherever it is cut."""
    before, body.PIECE_BYTES = body.PIECE_BYTES, piece
    try:
        assert body._unquoted(quote_plus(text, errors="replace")) == text.encode("utf-8", "replace").decode()
        assert body._unquoted(text) == unquote_plus(text.encode("utf-8", "replace").decode(), errors="replace")
    finally:
        body.PIECE_BYTES = before


def test_form_of_escapes_takes_little_memory() -> None:
    raw = b"payload=" + b"%41" * 1_000_000
    tracemalloc.start()
    try:
        found = read(raw, FORM, limit=4_000_000)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == Body("A" * 1_000_000, "text")
    assert most < 10 * len(raw)
