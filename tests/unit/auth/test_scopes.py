"""flowbridge.auth.scopes: what a key may do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.auth import scopes
from flowbridge.errors import Forbidden
from flowbridge.models import ApiKey

ROOM, OTHER, ALIAS = "!a:hs", "!b:hs", "#ops:hs"


@pytest.mark.parametrize(
    ("rooms", "event_types", "asked", "good"),
    [
        ((), (), ("m.room.message", ROOM), True),
        ((), ("m.room.message",), ("m.room.message", ROOM), True),
        ((), ("m.room.message",), ("m.room.messages", ROOM), False),
        ((), ("m.room.message",), ("m.room.name", ROOM), False),
        ((), ("m.room.*",), ("m.room.name", ROOM), True),
        ((), ("m.room.*",), ("m.room.", ROOM), True),
        ((), ("m.room.*",), ("m.room", ROOM), False),
        ((), ("m.room.*",), ("m.rooms.x", ROOM), False),
        ((), ("m.room.*",), ("M.ROOM.NAME", ROOM), False),
        ((), ("*",), ("anything", ROOM), True),
        ((), ("m.reaction", "m.room.*"), ("m.room.topic", ROOM), True),
        ((ROOM,), (), ("m.room.message", ROOM), True),
        ((ROOM,), (), ("m.room.message", OTHER), False),
        ((ROOM,), (), ("m.room.message", ALIAS), False),
        ((ROOM,), (), ("m.room.message", ALIAS, ROOM), True),
        ((ALIAS,), (), ("m.room.message", ALIAS, OTHER), True),
        ((ALIAS,), (), ("m.room.message", OTHER), False),
        ((ALIAS, OTHER), (), ("m.room.message", OTHER), True),
        (("!a",), (), ("m.room.message", ROOM), False),
        ((ROOM,), ("m.room.message",), ("m.room.message",), True),
        ((ROOM,), ("m.room.message",), ("m.room.name",), False),
        ((ROOM,), ("m.room.message",), ("m.room.message", OTHER), False),
        ((ROOM,), ("m.room.message",), ("m.room.name", ROOM), False),
    ],
)
def test_scopes(rooms: tuple[str, ...], event_types: tuple[str, ...], asked: tuple[str, ...], *, good: bool) -> None:
    for admin in (True, False):  # admin opens no room
        key = ApiKey("k", rooms=rooms, event_types=event_types, admin=admin)
        if good:
            scopes.permit(key, *asked)
        else:
            with pytest.raises(Forbidden):
                scopes.permit(key, *asked)


@given(st.text(max_size=30), st.text(max_size=30))
def test_beginning_covers_exactly_what_begins_so(beginning: str, event_type: str) -> None:
    key = ApiKey("k", event_types=(f"{beginning}*",))
    scopes.permit(key, beginning + event_type)
    if not event_type.startswith(beginning):
        with pytest.raises(Forbidden):
            scopes.permit(key, event_type)


def test_refusal_says_what_the_key_may_do() -> None:
    with pytest.raises(Forbidden) as caught:
        scopes.permit(ApiKey("k", rooms=(ROOM, ALIAS)), "m.room.message", OTHER)
    assert caught.value.body() == {
        "errcode": "M_FORBIDDEN",
        "error": "this API key is not for this: it is for all event types in !a:hs, #ops:hs, and for nothing else",
    }
    with pytest.raises(Forbidden, match=r"for m\.room\.message, m\.key\.\* in all rooms"):
        scopes.permit(ApiKey("k", event_types=("m.room.message", "m.key.*")), "m.room.name", OTHER)


def test_refusal_stays_short() -> None:
    many = tuple(f"!room{number}:hs" for number in range(5_000))
    with pytest.raises(Forbidden) as caught:
        scopes.permit(ApiKey("k", rooms=many), "m.room.message", OTHER)
    assert "!room9:hs and 4990 more" in caught.value.error
    assert "!room10:hs" not in caught.value.error


def test_scopes_bind_keys_alone() -> None:
    scopes.permit(None, "m.room.name", "!b:hs")
    scopes.permit_reading(None)
    scopes.permit_all(None)
    key = ApiKey("k1", rooms=("!a:hs", "#ops:hs"), event_types=("m.room.message", "org.example.*"))
    scopes.permit(key, "m.room.message", "!a:hs")
    with pytest.raises(Forbidden) as caught:
        scopes.permit(key, "m.room.message", "#other:hs", "!b:hs")
    assert (caught.value.status, caught.value.errcode) == (403, "M_FORBIDDEN")


@pytest.mark.parametrize(
    ("key", "good"),
    [
        (ApiKey("k", admin=True), True),
        (ApiKey("k"), False),
        (ApiKey("k", rooms=(ROOM,), admin=True), False),
        (ApiKey("k", event_types=("*",), admin=True), False),
    ],
)
def test_only_an_admin_key_without_limits_may_do_what_concerns_no_room(key: ApiKey, *, good: bool) -> None:
    if good:
        scopes.permit_all(key)
    else:
        with pytest.raises(Forbidden):
            scopes.permit_all(key)


# joining


@pytest.mark.parametrize(
    ("key", "good"),
    [
        (None, True),
        (ApiKey("k"), True),
        (ApiKey("k", rooms=(ROOM,)), True),
        (ApiKey("k", rooms=(ALIAS,)), True),
        (ApiKey("k", rooms=(ROOM,), event_types=("m.room.message",)), True),
        (ApiKey("k", rooms=(OTHER,)), False),
        (ApiKey("k", rooms=(OTHER,), event_types=("m.room.member",)), False),
        (ApiKey("k", event_types=("m.room.member",)), True),
        (ApiKey("k", event_types=("m.room.*",)), True),
        (ApiKey("k", event_types=("m.room.message",)), False),
        (ApiKey("k", event_types=("m.room.message",), admin=True), False),
    ],
)
def test_key_joins_the_rooms_that_it_names_whatever_its_event_types(key: ApiKey | None, *, good: bool) -> None:
    if good:
        scopes.permit_joining(key, ALIAS, ROOM)
    else:
        with pytest.raises(Forbidden):
            scopes.permit_joining(key, ALIAS, ROOM)


def test_refused_join_says_how_to_get_a_key_that_may() -> None:
    with pytest.raises(Forbidden) as caught:
        scopes.permit_joining(ApiKey("k", event_types=("m.room.message",)), ROOM)
    assert caught.value.error == (
        "this API key is for m.room.message only, and names no room that it may join: make one with --room, or have "
        "the bot join by another key"
    )
    with pytest.raises(Forbidden, match="this API key is not for this room: it is for !b:hs, and for no other"):
        scopes.permit_joining(ApiKey("k", rooms=(OTHER,)), ROOM)


# reading


@pytest.mark.parametrize(
    ("key", "room", "everything"),
    [
        (ApiKey("k"), True, True),
        (ApiKey("k", admin=True), True, True),
        (ApiKey("k", rooms=(ROOM,)), True, False),
        (ApiKey("k", rooms=(ALIAS,)), True, False),
        (ApiKey("k", rooms=(OTHER,)), False, False),
        (ApiKey("k", rooms=(ROOM,), admin=True), True, False),
        (ApiKey("k", rooms=(OTHER,), admin=True), False, False),
        (ApiKey("k", event_types=("m.room.*",)), False, False),
        (ApiKey("k", event_types=("m.room.*",), admin=True), False, False),
    ],
)
def test_key_that_may_read_a_room_or_everything(key: ApiKey, *, room: bool, everything: bool) -> None:
    for rooms, good in (((ALIAS, ROOM), room), ((), everything)):
        if good:
            scopes.permit_reading(key, *rooms)
        else:
            with pytest.raises(Forbidden):
                scopes.permit_reading(key, *rooms)
