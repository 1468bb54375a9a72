"""The delivery log over HTTP: its filters, refused calls, and what a queued event waits for."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.models.timing import Timing
from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, ROOM, SEND, Bridge, as_caller, new_token, post, running
from tests.http.sends import ASYNC, ELSEWHERE, MATRIX, check_queued, limited, text
from tests.upstream import PATIENCE, Upstream

OTHER = "!elsewhere:upstream"
NO_TIME = "is not a time: write it like 2026-11-22T10:00:00Z, like 2h or 7d for so long ago, or as seconds since 1970"
Json = dict[str, Any]


@pytest.fixture
def bridge(upstream: Upstream, tmp_path: Path) -> Any:
    """With an empty log."""
    with running(upstream, tmp_path) as bridge:
        yield bridge


@pytest.fixture
def caller(bridge: Bridge) -> Any:
    with as_caller(bridge) as client:
        yield client


@pytest.fixture
def admin(bridge: Bridge) -> Any:
    """With a key that has `admin` and no limits."""
    headers = {"X-API-Key": KEY}
    with httpx.Client(base_url=bridge.url, headers=headers, trust_env=False, timeout=2 * PATIENCE) as client:
        yield client


def listed(client: httpx.Client, **parameters: str) -> list[Json]:
    answer = client.get("/deliveries", params=parameters)
    assert answer.status_code == 200, answer.text
    found: list[Json] = answer.json()["deliveries"]
    return found


def sent(client: httpx.Client, path: str = SEND, body: object = HELLO, **headers: str) -> str:
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["flowbridge-delivery"]


def refusal(answer: httpx.Response) -> str:
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_INVALID_PARAM"), answer.text
    return str(answer.json()["error"])


# filters


def test_log_is_filtered_by_room_type_key_and_text(caller: httpx.Client) -> None:
    backup = sent(caller, body=text("The backup is done"), **{"Idempotency-Key": "order-17"})
    topic = sent(caller, f"/rooms/{ROOM}/send/m.room.topic", {"topic": "backup"})
    other = sent(caller, ELSEWHERE)
    matrix = caller.put(f"{MATRIX}{ELSEWHERE}/m17", json=text("from a client")).headers["flowbridge-delivery"]

    def found(**parameters: str) -> list[str]:
        return [one["delivery_id"] for one in listed(caller, **parameters)]

    assert found() == [matrix, other, topic, backup]
    assert found(room=ROOM) == found(room_id=ROOM) == [topic, backup]
    assert found(type="m.room.topic") == found(event_type="m.room.topic") == [topic]
    assert found(key="order-17") == [backup]
    assert found(key="m17") == [matrix]
    assert found(q="BACKUP") == [topic, backup]
    assert found(q="backup", type="m.room.message", room=ROOM, state="sent", since="2h") == [backup]
    assert found(since="2h") == found(since="2020-01-01") == found(since=f"{time.time() - 60:.0f}") == found()
    assert found(until="2h") == []
    assert listed(caller, key="order-17")[0]["key"] == "order-17"


def test_room_may_be_named_by_its_alias(caller: httpx.Client, admin: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.answer({"room_id": ROOM, "servers": []}), at="/directory/room/")
    delivery = sent(caller)
    sent(caller, ELSEWHERE)
    for client in (caller, admin):
        assert [one["delivery_id"] for one in listed(client, room="#ops:upstream")] == [delivery]


def test_alias_that_leads_nowhere_is_said_to(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(scripted.matrix_error(404, "M_NOT_FOUND", "Room alias not found"), at="/directory/room/")
    said = refusal(caller.get("/deliveries", params={"room": "#nowhere:upstream"}))
    assert said == "room: #nowhere:upstream leads to no room, or not for this account: Room alias not found"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"room": "lobby"}, "room: 'lobby' is not a room: a room id begins with '!', an alias with '#'"),
        ({"room_id": "lobby"}, "room_id: 'lobby' is not a room: a room id begins with '!', an alias with '#'"),
        ({"room": "#ops"}, "room: '#ops' is not a room alias: it has the form #name:server"),
        ({"since": "yesterday"}, f"since: 'yesterday' {NO_TIME}"),
        ({"until": "2026-13-01"}, f"until: '2026-13-01' {NO_TIME}"),
        ({"q": "x"}, "q: it takes 2 to 200 characters to search for, not 1"),
        ({"q": "x" * 201}, "q: it takes 2 to 200 characters to search for, not 201"),
        ({"state": "lost"}, "state: 'lost' is none of sent, queued, dead, refused"),
        ({"key": "x" * 300}, "the key is longer than 255 bytes"),
        (
            {"room": ROOM, "room_id": OTHER},
            "room_id and event_type are older names of room and type: send one of the two",
        ),
    ],
)
def test_filter_that_cannot_be_read_says_why(caller: httpx.Client, parameters: dict[str, str], said: str) -> None:
    assert refusal(caller.get("/deliveries", params=parameters)) == said


@pytest.mark.parametrize(
    ("method", "path", "name", "near"),
    [
        ("GET", "/deliveries", "rooom", "room"),
        ("GET", "/deliveries", "status", "state"),
        ("GET", "/deliveries", "Types", "type"),
        ("GET", "/deliveries", "sinse", "since"),
        ("POST", "/deliveries/x/replay", "overwite", "overwrite"),
        ("GET", f"/rooms/{ROOM}/messages", "limits", "limit"),
        ("GET", "/initialSync", "Limit", "limit"),
        ("GET", "/live", "type", "types"),
        ("POST", "/media", "file_name", "filename"),
    ],
)
def test_parameter_with_a_slip_is_told_the_nearest_one(
    caller: httpx.Client, method: str, path: str, name: str, near: str
) -> None:
    said = refusal(caller.request(method, path, params={name: "x"}))
    assert said.startswith(f"{name}: unknown here; did you mean {near}? known are ")


def test_parameter_that_is_like_none_is_told_what_there_is(caller: httpx.Client) -> None:
    said = refusal(caller.get("/deliveries", params={"zzz": "x"}))
    assert said.startswith("zzz: unknown here; known are access_token, cursor, ")


TOLD = {"/hooks/{name}": {"post"}, "/hooks/{name}/{token}": {"post", "put"}}


def test_every_endpoint_of_the_flow_surface_refuses_an_unknown_parameter(caller: httpx.Client) -> None:
    """All that the document has, but for what the comment in routes/operations.py and accounts.py excepts, and the
    addresses that senders of webhooks are given: what these add to them is theirs."""
    lenient = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/login/fallback", "/.well-known/matrix/client"}
    asked = 0
    for path, operations in caller.get("/openapi.json").json()["paths"].items():
        if path.startswith("/_matrix/") or path in lenient:
            continue
        for method in operations.keys() - TOLD.get(path, set()):
            target = path.replace("{roomId}", ROOM).replace("{roomIdOrAlias}", ROOM).replace("{eventType}", "m.x")
            target = "/".join("x" if segment.startswith("{") else segment for segment in target.split("/"))
            said = refusal(caller.request(method, target, params={"nonesuch": "1"}, content=b"{}"))
            assert said.startswith("nonesuch: unknown here; "), (method, path)
            asked += 1
    assert asked > 30
    for path in lenient:
        assert "nonesuch" not in caller.get(path, params={"nonesuch": "1"}).text, "a probe's cache buster"


# refused calls


def test_refused_send_is_in_the_log_with_its_reason_and_no_body(
    bridge: Bridge, caller: httpx.Client, admin: httpx.Client
) -> None:
    accepted = sent(caller)
    for _ in range(3):
        wrong = caller.post(SEND, json={"msgtype": "m.text", "secret": "hunter2"}, headers={"Idempotency-Key": "k"})
        assert wrong.status_code == 400
    last = sent(caller)
    found = listed(caller)
    assert [one["delivery_id"] for one in found if one["status"] == "sent"] == [last, accepted]
    (refused,) = listed(caller, state="refused")
    assert refused in found
    assert refused["status"] == "refused"
    assert (refused["room_id"], refused["event_type"], refused["count"]) == (ROOM, "m.room.message", 3)
    assert refused["error"] == {"status": 400, "errcode": "M_BAD_JSON", "error": wrong.json()["error"]}
    assert refused["user_id"].startswith("@")
    assert refused["address"] == "127.0.0.1"
    assert refused["refused_at"] <= refused["last_refused_at"]
    assert caller.get(f"/deliveries/{refused['delivery_id']}").json() == refused
    assert listed(admin, state="refused") == [refused]
    assert listed(caller, state="dead,refused") == [refused]
    assert listed(caller, state="refused", room=OTHER) == []
    assert listed(caller, key="k") == [], "nothing was accepted under it"
    assert b"hunter2" not in admin.get("/deliveries").content
    with as_caller(bridge, new_token()) as other:
        assert listed(other) == []
        assert other.get(f"/deliveries/{refused['delivery_id']}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", f"/rooms/{ROOM}/send/m.room.message", b'{"msgtype": 1}', (), 400),
        ("PUT", f"{MATRIX}/rooms/{ROOM}/send/m.room.message/1", b"{", (), 400),
        ("PUT", f"/rooms/{ROOM}/state/m.room.topic", b'{"topic": 1}', (), 400),
        ("POST", f"/rooms/{ROOM}/send/m.room.message", b"x" * 70_000, (), 413),
        ("POST", f"/rooms/{ROOM}/send/m.room.message", b"a=b", ("Content-Encoding: gzip",), 415),
        ("POST", f"/rooms/{ROOM}/send/m.room.message?nonesuch=1", b'"x"', (), 400),
        ("POST", f"/rooms/{ROOM}/send/m.room.mesage", b"{}", (), 400),
    ],
)
def test_every_kind_of_refused_send_is_in_the_log(
    bridge: Bridge, admin: httpx.Client, method: str, path: str, body: bytes, headers: tuple[str, ...], status: int
) -> None:
    answer = bridge.post(path, body, *headers, method=method)
    assert answer.status == status, answer.body
    (found,) = listed(admin, state="refused")
    assert found["error"] == {"status": status, **{name: answer.json()[name] for name in ("errcode", "error")}}
    assert found["room_id"] == ROOM


def test_calls_with_a_wrong_key_are_one_entry_that_only_an_admin_sees(
    bridge: Bridge, caller: httpx.Client, admin: httpx.Client
) -> None:
    secret = "fb_" + "wrong" * 10
    for number in range(4):
        path = f"/rooms/!{number}:upstream/send/m.room.message"
        answer = bridge.ask(post(path, b'"hello"', f"X-API-Key: {secret}", "Authorization: Basic x"))
        assert answer.status == 401, answer.body
    (found,) = listed(admin)
    assert (found["count"], found["error"]["status"], found["room_id"]) == (4, 401, "!0:upstream")
    assert "user_id" not in found
    assert "api_key" not in found
    assert secret not in admin.get("/deliveries").text
    assert listed(caller) == []


def test_what_was_refused_is_not_sent_again_but_can_be_deleted(caller: httpx.Client) -> None:
    sent(caller)  # from here on it is known whose token it is
    caller.post(SEND, json={"msgtype": 1})
    (found,) = listed(caller, state="refused")
    answer = caller.post(f"/deliveries/{found['delivery_id']}/replay")
    assert (answer.status_code, answer.json()["error"]) == (
        409,
        "this call was refused, and nothing of its body is kept: send it again",
    )
    assert caller.delete(f"/deliveries/{found['delivery_id']}").json() == {}
    assert listed(caller, state="refused") == []
    assert caller.get(f"/deliveries/{found['delivery_id']}").status_code == 404


def test_reads_and_trials_that_are_refused_are_no_sends(caller: httpx.Client, admin: httpx.Client) -> None:
    assert caller.post("/validate/m.room.message", json={}).status_code == 400
    assert caller.get("/deliveries?nonesuch=1").status_code == 400
    assert caller.get(f"/rooms/{ROOM}/state/m.room.topic?nonesuch=1").status_code == 400
    assert caller.post("/nowhere").status_code == 404
    assert listed(admin) == []


def test_pages_hold_events_and_refused_calls_in_one_order(caller: httpx.Client) -> None:
    expected = []
    for number in range(3):
        expected.append(sent(caller, body=text(f"{number}")))
        caller.post(f"/rooms/!{number}:upstream/send/m.room.message", json={"msgtype": 1})
        listed(caller)  # writes it
        expected.append(f"!{number}:upstream")
    for limit in (1, 2, 3, 50):
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = caller.get("/deliveries", params={"limit": str(limit), **cursor}).json()
            found += [one["delivery_id" if one["status"] == "sent" else "room_id"] for one in page["deliveries"]]
            if "next" not in page:
                break
            cursor = {"cursor": page["next"]}
        assert found == expected[::-1]


# what a queued event waits for


def test_list_says_what_each_queued_event_waits_for(caller: httpx.Client, upstream: Upstream) -> None:
    upstream.always(limited(60_000), at="/send/")
    first = check_queued(caller.post(SEND, json=HELLO, headers=ASYNC))
    second = check_queued(caller.post(SEND, json=HELLO, headers=ASYNC))
    ending = time.monotonic() + PATIENCE
    while (found := listed(caller, state="queued"))[-1].get("waiting", {}).get("until") is None:
        assert time.monotonic() < ending, found
        time.sleep(0.02)
    assert [one["delivery_id"] for one in found] == [second, first]
    assert found[1]["waiting"]["reason"] == "the homeserver limits how much this account may send"
    shown = caller.get(f"/deliveries/{second}").json()
    assert shown["waiting"]["reason"] == found[0]["waiting"]["reason"]


def test_event_in_flight_is_being_sent_and_the_next_one_is_behind_it(
    caller: httpx.Client, upstream: Upstream, go: Any
) -> None:
    upstream.always(scripted.when(go, scripted.answer({"event_id": "$event"})), at="/send/")
    first = check_queued(caller.post(SEND, json=HELLO, headers=ASYNC))
    second = check_queued(caller.post(SEND, json=HELLO, headers=ASYNC))
    ending = time.monotonic() + PATIENCE
    while (found := listed(caller))[-1]["waiting"] != {"reason": "it is being sent"}:
        assert time.monotonic() < ending, found
        time.sleep(0.02)
    assert found[0]["delivery_id"] == second
    assert found[0]["waiting"] == {"reason": "an older event of this room first", "behind": first}
    go.set()
    while any("waiting" in one for one in listed(caller)):
        assert time.monotonic() < ending
        time.sleep(0.02)


def test_contents_that_are_not_kept_are_not_shown_nor_sent_again(upstream: Upstream, tmp_path: Path) -> None:
    timing = Timing(purge_seconds=0.05)
    with running(upstream, tmp_path, timing=timing, keep_content_days=0.0) as bridge, as_caller(bridge) as caller:
        delivery = sent(caller, **{"Idempotency-Key": "k"})
        ending = time.monotonic() + PATIENCE
        while "event" in (shown := caller.get(f"/deliveries/{delivery}").json()):
            assert time.monotonic() < ending
            time.sleep(0.02)
        assert "request" not in shown
        assert (shown["status"], shown["key"]) == ("sent", "k")
        again = caller.post(SEND, json=HELLO, headers={"Idempotency-Key": "k"})
        assert again.headers["idempotent-replayed"] == "true", "its key is remembered"
        replayed = caller.post(f"/deliveries/{delivery}/replay")
        assert (replayed.status_code, replayed.json()["error"]) == (
            409,
            "its content is not kept any more (FLOWBRIDGE_KEEP_CONTENT_DAYS), so it cannot be sent again",
        )
