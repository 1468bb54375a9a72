"""What a file is called, of what type it is, and which JSON holds one."""

import json
from typing import Any

import pytest

from flowbridge.errors import BadContent, BadRequest
from flowbridge.services.media import attachment
from flowbridge.services.media.attachment import Label


@pytest.mark.parametrize(
    ("name", "type_"),
    [("a.png", "image/png"), ("a.WEBP", "image/webp"), ("a.tar.gz", attachment.UNKNOWN), ("a", attachment.UNKNOWN)],
)
def test_type_is_guessed_from_the_name(name: str, type_: str) -> None:
    assert Label(name).media_type == type_
    assert Label(name, "text/x").media_type == "text/x"


@pytest.mark.parametrize("size", [0, 1, 65_536, 200_000])
def test_buffer_of_any_length_is_read(size: int) -> None:
    data = bytes(number % 256 for number in range(size))
    for body in ({"type": "Buffer", "data": list(data)}, {"payload": {"data": list(data), "type": "Buffer"}}):
        found = attachment.read(json.dumps(body).encode())
        assert found is not None
        assert found.data == data


@pytest.mark.parametrize("numbers", ["1,", ",1", "1 2", "1,,2", "+1", "1_0", "0x1", "1e1", "9" * 5000])
def test_what_is_no_list_of_bytes_is_refused(numbers: str) -> None:
    with pytest.raises(BadContent):
        attachment.read(f'{{"type": "Buffer", "data": [{numbers}]}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b'{"type": "Buffer", "data": [1}',
        b'{"type": "Buffer", "data": [[1]]}',
        b'{"type": "Blob", "data": [1]}',
        b'{"payload": {"payload": {"data": ""}}}',
        b'{"x\\"data": [1], "type": "Buffer"}',
        b"[" * 100_000,
    ],
)
def test_other_json_is_a_file_itself(body: bytes) -> None:
    assert attachment.read(body) is None


@pytest.mark.parametrize(
    ("body", "at"),
    [
        ({"url": "https://example.org/cat.png"}, "/url"),
        ({"url": "https://example.org/cat.png", "filename": "cat.png"}, "/url"),
        ({"payload": {"url": "https://example.org/cat.png"}, "topic": "x"}, "/payload/url"),
    ],
)
def test_link_to_a_file_is_refused_at_the_link(body: Any, at: str) -> None:
    with pytest.raises(BadContent, match="is not fetched") as caught:
        attachment.read(json.dumps(body).encode())
    assert [problem.pointer for problem in caught.value.problems] == [at]


def test_json_with_a_url_and_more_is_a_file_itself() -> None:
    assert attachment.read(json.dumps({"url": "https://example.org/", "title": "x"}).encode()) is None


@pytest.mark.parametrize("value", [[{"data": "aGk="}], {"rows": [{"id": 1}]}, "text", 1])
def test_long_json_that_cannot_hold_a_file_is_not_read(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(attachment, "large_json", None)
    assert attachment.read(json.dumps(value).encode()) is None


@pytest.mark.parametrize("text", ["image", "image/", "/png", "image/png\r\nX: y", "image/pñg", "a b/c"])
def test_what_is_no_media_type_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        attachment.content_type(text)
