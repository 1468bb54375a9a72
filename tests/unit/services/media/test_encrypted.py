"""flowbridge.services.media.encrypted: which file of an event is meant."""

from typing import Any

import pytest

from flowbridge.errors import BadGateway, NotFound
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.encrypted import find
from tests.unit.encryption.test_attachments import described

URI = "mxc://hs/abc"


def event(**content: Any) -> dict[str, Any]:
    return {"type": "m.room.message", "content": {"msgtype": "m.file", "body": "b", **content}}


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ({"file": described(), "filename": "a.png", "info": {"mimetype": "image/png"}}, Label("a.png", "image/png")),
        ({"file": described()}, Label("b", "")),
        ({"file": described(), "filename": "../../etc/a", "info": {"mimetype": "no type"}}, Label("a", "")),
        ({"file": described(), "filename": "a\0", "info": {"mimetype": 7}}, Label("", "")),
        (
            {"info": {"thumbnail_file": described(), "thumbnail_info": {"mimetype": "image/jpeg"}}},
            Label("", "image/jpeg"),
        ),
        ({"m.new_content": {"file": described(), "filename": "new"}}, Label("new", "")),
    ],
    ids=["file", "plain", "path", "hostile", "thumbnail", "edit"],
)
def test_file_of_an_event_is_found_by_its_address(content: dict[str, Any], label: Label) -> None:
    found = find(event(**content), URI)
    assert found is not None
    assert (found[0].uri, found[1]) == (URI, label)


@pytest.mark.parametrize("content", [{"url": URI}, {"info": {"thumbnail_url": URI}}])
def test_file_that_is_not_encrypted_is_given_as_it_is(content: dict[str, Any]) -> None:
    assert find(event(**content), URI) is None


@pytest.mark.parametrize("content", [{}, {"file": 1}, {"file": described(url="mxc://hs/other")}, {"info": []}])
def test_file_of_another_event_is_not_found(content: dict[str, Any]) -> None:
    with pytest.raises(NotFound, match="no file of this address"):
        find(event(**content), URI)


def test_file_without_a_key_is_said_to_be_wrong() -> None:
    with pytest.raises(BadGateway, match="its key is not one for A256CTR"):
        find(event(file=described(key={})), URI)


def test_event_that_cannot_be_decrypted_says_why() -> None:
    encrypted = {"type": "m.room.encrypted", "content": {}, "flowbridge": {"undecryptable": "its key has not come"}}
    with pytest.raises(NotFound, match="its key has not come"):
        find(encrypted, URI)
