"""flowbridge.services.legacy_events"""

from typing import Any

from flowbridge.services import legacy_events

ME = "@me:hs"


def message(body: str, time: int, **more: Any) -> dict[str, Any]:
    return {"type": "m.room.message", "content": {"body": body}, "sender": "@a:hs", "origin_server_ts": time, **more}


def test_old_fields_stand_beside_todays() -> None:
    today = message("x", 7, unsigned={"age": 3, "prev_content": {"body": "w"}, "transaction_id": "t"})
    assert legacy_events.event(today, "!r:hs") == {
        **today,
        "room_id": "!r:hs",
        "user_id": "@a:hs",
        "ts": 7,
        "age": 3,
        "prev_content": {"body": "w"},
    }


def test_membership_of_a_member_only() -> None:
    content = {"membership": "ban"}
    assert legacy_events.event({"type": "m.room.member", "content": content})["membership"] == "ban"
    assert "membership" not in legacy_events.event({"type": "m.room.message", "content": content})


def test_nothing_is_made_up() -> None:
    assert legacy_events.event({"type": "m.room.member", "content": None, "unsigned": 7}) == {
        "type": "m.room.member",
        "content": None,
        "unsigned": 7,
    }


def test_end_is_added_to_an_empty_page_only() -> None:
    assert legacy_events.page({"chunk": [], "start": "t1"}) == {"chunk": [], "start": "t1", "end": "t1"}
    assert "end" not in legacy_events.page({"chunk": [message("x", 1)], "start": "t1"})
    assert legacy_events.page({"chunk": [], "start": "t1", "end": "t0"})["end"] == "t0"
    assert legacy_events.page({"chunk": []}) == {"chunk": []}, "members"


def test_rooms_are_merged_by_time_and_keep_their_order() -> None:
    late_clock = [message("a1", 50), message("a2", 10), message("a3", 60)]
    rooms = {"!a:hs": {"timeline": {"events": late_clock}}, "!b:hs": {"timeline": {"events": [message("b1", 55)]}}}
    found = legacy_events.chunk({"next_batch": "s", "rooms": {"join": rooms}}, ME, {})
    assert [event["content"]["body"] for event in found] == ["a1", "a2", "b1", "a3"]


def test_state_is_that_at_the_end_of_the_timeline() -> None:
    def topic(text: str) -> dict[str, Any]:
        return {"type": "m.room.topic", "state_key": "", "content": {"topic": text}}

    name = {"type": "m.room.name", "state_key": "", "content": {"name": "n"}}
    data = {"state": {"events": [topic("old"), name]}, "timeline": {"events": [topic("new"), message("x", 1)]}}
    found = legacy_events.room({"next_batch": "s9", "rooms": {"join": {"!r:hs": data}}}, ME, "join", "!r:hs")
    assert [event["content"] for event in found["state"]] == [{"topic": "new"}, {"name": "n"}]
    assert found["messages"]["start"] == found["messages"]["end"] == "s9", "no prev_batch: there is nothing before"


def test_invitation_without_the_event_is_still_one() -> None:
    sync = {"next_batch": "s9", "rooms": {"invite": {"!r:hs": {}}}}
    assert legacy_events.room(sync, ME, "invite", "!r:hs") == {
        "room_id": "!r:hs",
        "membership": "invite",
        "inviter": "",
        "invite": {"room_id": "!r:hs", "invite_room_state": []},
    }


def test_encrypted_rooms_are_marked() -> None:
    def joined(*state: dict[str, Any], **timeline: Any) -> dict[str, Any]:
        return {"state": {"events": list(state)}, **timeline}

    def encryption(**more: Any) -> dict[str, Any]:
        return {"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}, **more}

    name = {"type": "m.room.name", "state_key": "", "content": {"name": "n"}}
    rooms = {
        "!a": joined(encryption(state_key=""), name),
        "!b": joined(name),
        "!c": joined(timeline={"events": [encryption(state_key="")]}),
        "!d": joined(encryption(state_key="other"), timeline={"events": [encryption()]}),
    }
    assert legacy_events.named_rooms({"rooms": {"join": rooms}}) == [
        {"room_id": "!a", "name": "n", "encrypted": True},
        {"room_id": "!b", "name": "n"},
        {"room_id": "!c", "encrypted": True},
        {"room_id": "!d"},
    ]
