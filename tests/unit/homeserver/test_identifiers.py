"""flowbridge.homeserver.identifiers: which segments may stand in a Matrix path, and that they arrive as they came."""

from collections.abc import Callable
from urllib.parse import quote, unquote

import httpx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowbridge.errors import BadRequest
from flowbridge.homeserver import identifiers, paths

Check = Callable[[str], str]


def transaction(raw: str) -> str:
    return identifiers.segment(raw, "transaction id")


def state_key(raw: str) -> str:
    return identifiers.segment(raw, "state key", empty=True)


CHECKS: list[Check] = [identifiers.room, identifiers.event_type, transaction, state_key]


@pytest.mark.parametrize(
    ("raw", "room"),
    [
        ("!abc:example.org", "!abc:example.org"),
        ("%21abc%3Aexample.org", "!abc:example.org"),
        ("%21abc:example.org:8448", "!abc:example.org:8448"),
        ("!31hneApxJ_1o-63DmFrpeqnkFfWppnzWso1JvH3ogLM", "!31hneApxJ_1o-63DmFrpeqnkFfWppnzWso1JvH3ogLM"),
        ("!%C3%A9", "!é"),
        ("!é", "!é"),
        ("!..", "!.."),
        ("#flow:example.org", "#flow:example.org"),
        ("%23flow%3aexample.org", "#flow:example.org"),
        ("%23a%2Fb:example.org", "#a/b:example.org"),
        ("%23a%2Fb%3A[::1]:80", "#a/b:[::1]:80"),
    ],
)
def test_room_id_and_alias_are_read_raw_and_encoded(raw: str, room: str) -> None:
    assert identifiers.room(raw) == room


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "!",
        "#",
        "#:",
        "#a",
        "#a:",
        "#:hs",
        "abc",
        "@user:hs",
        "$event",
        "%2Fetc",
        "+a:hs",
        "%",
        "%2",
        "!a%2Fb:hs",
        "!%2F",
    ],
)
def test_what_is_no_room_is_refused(raw: str) -> None:
    with pytest.raises(BadRequest, match="room") as caught:
        identifiers.room(raw)
    assert (caught.value.status, caught.value.errcode) == (400, "M_INVALID_PARAM")


@pytest.mark.parametrize(("raw", "type_"), [("m.room.message", "m.room.message"), ("org.x%20y", "org.x y"), ("é", "é")])
def test_event_type_is_decoded(raw: str, type_: str) -> None:
    assert identifiers.event_type(raw) == type_


@pytest.mark.parametrize("raw", ["", "a%2Fb", "%2f", "m.room.message%2F..%2Fx"])
def test_event_type_that_is_empty_or_holds_a_slash_is_refused(raw: str) -> None:
    with pytest.raises(BadRequest, match="event type"):
        identifiers.event_type(raw)


@pytest.mark.parametrize(
    ("raw", "txn_id"), [("ab%2Fcd", "ab/cd"), ("%2F", "/"), ("a%252Fb", "a%2Fb"), ("m1.2", "m1.2"), ("%zz", "%zz")]
)
def test_slash_inside_a_transaction_id_is_kept_and_arrives(raw: str, txn_id: str) -> None:
    assert transaction(raw) == txn_id
    target = paths.send_target("!a:hs", "m.room.message", txn_id)
    assert target == f"/_matrix/client/v3/rooms/%21a%3Ahs/send/m.room.message/{quote(txn_id, safe='')}"


def test_state_key_may_be_empty_and_a_transaction_id_may_not() -> None:
    assert state_key("") == ""
    with pytest.raises(BadRequest, match="transaction id is empty"):
        transaction("")


@pytest.mark.parametrize("check", [identifiers.event_type, transaction, state_key])
@pytest.mark.parametrize("raw", [".", "..", "%2e", "%2E%2e", ".%2E", "%2e."])
def test_dots_alone_are_refused_however_they_are_written(raw: str, check: Check) -> None:
    with pytest.raises(BadRequest, match="may not be"):
        check(raw)


@pytest.mark.parametrize("check", [identifiers.event_type, transaction, state_key])
@pytest.mark.parametrize("raw", ["...", ".a", "a..", "%252e%252e"])
def test_dots_among_others_are_taken(raw: str, check: Check) -> None:
    assert check(raw) == unquote(raw)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("raw", ["%00", "a%0Ab", "%0d%0a", "%7F", "%1b[0m", "\t", "a\nb", "%C2%85", "\x9f"])
def test_control_character_is_refused(raw: str, check: Check) -> None:
    for prefix in ("", "!", "#a:"):
        with pytest.raises(BadRequest):
            check(prefix + raw)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("raw", ["!%ff", "!%C3", "!a%ED%A0%80", "%fe"])
def test_what_is_not_utf8_is_refused(raw: str, check: Check) -> None:
    with pytest.raises(BadRequest, match="not UTF-8"):
        check(raw)


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(BadRequest):
        identifiers.identifier("a\ud800", "state key")


@pytest.mark.parametrize("check", CHECKS)
def test_255_bytes_are_taken_and_256_refused(check: Check) -> None:
    for text in ("!" + "x" * 254, "!" + quote("é" * 127), "!" + quote("😀" * 63) + "xx"):
        assert check(text) == unquote(text)
        with pytest.raises(BadRequest, match="255 bytes"):
            check(text + "x")


PLAIN = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1, max_size=25)
ODD = st.sampled_from(
    ["%2e%2e%2F", "%2e%2e", "a%2Fb", "?x=1", "#", "%23", "%25", "\\", "//", "%", ";", "a b", "+", "\u202e", "\n"]
)
RAW = PLAIN | PLAIN.map(lambda text: quote(text, safe="")) | ODD


def accepted(check: Check, raw: str) -> str:
    """What `check` makes of it; an example that it refuses is not used."""
    try:
        return check(raw)
    except BadRequest:
        assume(condition=False)
        raise


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["!", "#a:", "%21"]), RAW, RAW, RAW)
def test_target_decodes_to_exactly_the_segments_that_were_given(sigil: str, room: str, type_: str, last: str) -> None:
    room_id = accepted(identifiers.room, sigil + room)
    event_type = accepted(identifiers.event_type, type_)
    txn_id = accepted(transaction, last)
    for target, verb in (
        (paths.send_target(room_id, event_type, txn_id), "send"),
        (paths.state_target(room_id, event_type, txn_id), "state"),
    ):
        assert target.isascii()
        segments = [unquote(segment, errors="strict") for segment in target.split("/")]
        assert segments == ["", "_matrix", "client", "v3", "rooms", room_id, verb, event_type, txn_id]
        assert httpx.URL(f"https://hs.example.org{target}").raw_path.decode() == target
