"""Rooms in front of a scripted homeserver: what it is asked, and answers that no Synapse gives."""

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.services.rooms import MAX_AT_ONCE
from tests import upstream as scripted
from tests.http.conftest import (
    BOT_TOKEN,
    HELLO,
    KEY,
    SEND,
    SHORT_REQUEST_SECONDS,
    Bridge,
    RawClient,
    as_caller,
    post,
    running,
)
from tests.upstream import Connection, Request, Upstream

V3 = "/_matrix/client/v3"
ALIAS = "%23tutorial%3Aupstream"


def test_alias_is_the_homeservers_or_made_from_the_users_server(caller: httpx.Client, upstream: Upstream) -> None:
    wish = {"room_alias_name": "tutorial"}
    upstream.always(scripted.answer({"room_id": "!r"}), at="/createRoom")
    assert caller.post("/rooms", json=wish).json() == {"room_id": "!r", "room_alias": "#tutorial:upstream"}
    upstream.always(scripted.answer({"room_id": "!r", "room_alias": "#tutorial:hs"}), at="/createRoom")
    assert caller.post("/rooms", json=wish).json() == {"room_id": "!r", "room_alias": "#tutorial:hs"}


def test_join_may_take_longer_than_a_send(impatient: Bridge, upstream: Upstream) -> None:
    """A room of another server may be large, and far away."""

    def late(connection: Connection) -> None:
        connection.stopping.wait(SHORT_REQUEST_SECONDS * 1.25)
        scripted.answer({"room_id": "!far"})(connection)

    upstream.always(late, at="/join/")
    assert impatient.post("/join/!far?via=example.org").json() == {"room_id": "!far"}


def test_slow_joins_leave_connections_for_sends(impatient: Bridge, upstream: Upstream, go: threading.Event) -> None:
    upstream.always(scripted.when(go, scripted.answer({"room_id": "!far"})), at="/join/")
    join = "/join/!far?via=example.org"
    clients = [impatient.connect() for _ in range(MAX_AT_ONCE)]
    try:
        for client in clients:
            client.send(post(join))
        upstream.wait_for_events(MAX_AT_ONCE)
        too_many = impatient.post(join)
        assert (too_many.status, too_many.headers["retry-after"]) == (503, "1")
        assert impatient.post(SEND, json.dumps(HELLO).encode(), "Prefer: wait=60").status == 200
        go.set()
        assert [client.answer().status for client in clients] == [200] * MAX_AT_ONCE
    finally:
        for client in clients:
            client.__exit__()
    assert impatient.post(join).status == 200


def asked(upstream: Upstream) -> list[str]:
    """What the homeserver was asked, but for who it is."""
    return [f"{request.method} {request.target}" for request in upstream.requests if "whoami" not in request.target]


@pytest.mark.parametrize(
    ("path", "targets"),
    [
        ("/join/!r", [f"POST {V3}/rooms/%21r/join"]),
        ("/join/!r?via=a&server_name=b&via=", [f"POST {V3}/join/%21r?via=a&server_name=b"]),
        ("/rooms/!r/join?via=a", [f"POST {V3}/join/%21r?via=a"]),
        ("/_matrix/client/v3/rooms/!r/invite?other=c", [f"POST {V3}/rooms/%21r/invite?other=c"]),
        ("/join/#tutorial:upstream?via=a", [f"POST {V3}/join/{ALIAS}?via=a"]),
        ("/rooms/#tutorial:upstream/join", [f"POST {V3}/join/{ALIAS}"]),
        ("/rooms/#tutorial:upstream/leave", [f"GET {V3}/directory/room/{ALIAS}", f"POST {V3}/rooms/%21r/leave"]),
        ("/_matrix/client/api/v1/rooms/!r%3Ahs/unban", [f"POST {V3}/rooms/%21r%3Ahs/unban"]),
    ],
)
def test_homeserver_is_asked_what_was_meant(bridge: Bridge, upstream: Upstream, path: str, targets: list[str]) -> None:
    upstream.script(lambda request: None if "whoami" in request.target else scripted.answer({"room_id": "!r"}))
    assert bridge.post(path, b"null").status == 200
    assert asked(upstream) == targets
    assert all(request.body == b"{}" for request in upstream.requests if request.method == "POST")


@pytest.mark.parametrize("odd", [{}, {"room_id": 5}, {"room_id": "#alias"}])
def test_directory_that_makes_no_sense_is_a_502(caller: httpx.Client, upstream: Upstream, odd: dict[str, Any]) -> None:
    upstream.always(scripted.answer(odd), at="/directory/room/")
    answer = caller.post(f"/rooms/{ALIAS}/leave")
    assert (answer.status_code, answer.json()["errcode"]) == (502, "M_UNKNOWN")


@pytest.mark.parametrize("path", ["/rooms", "/join/!r", f"/join/{ALIAS}", "/rooms/!r/leave"])
def test_key_is_the_bot_and_stays_here(bridge: Bridge, upstream: Upstream, path: str) -> None:
    upstream.script(lambda request: None if "whoami" in request.target else scripted.answer({"room_id": "!r"}))
    with as_caller(bridge, KEY) as caller:
        assert caller.post(path).status_code == 200
    posted = upstream.requests[-1]
    assert posted.header("authorization") == f"Bearer {BOT_TOKEN}"
    assert KEY not in f"{posted.target}{posted.headers}"


@pytest.mark.parametrize("path", ["/rooms", "/join/!r", "/rooms/!r/leave", f"/rooms/{ALIAS}/leave"])
def test_token_that_is_refused_is_a_401_and_the_bots_a_502(upstream: Upstream, tmp_path: Path, path: str) -> None:
    unknown = scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "gone", soft_logout=True)

    def script(request: Request) -> scripted.Behaviour | None:
        return None if "whoami" in request.target else unknown

    upstream.script(script)
    with running(upstream, tmp_path) as bridge:
        with as_caller(bridge) as caller:
            answer = caller.post(path)
            assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
            assert answer.json()["soft_logout"] is True
        with as_caller(bridge, KEY) as caller:
            answer = caller.post(path)
            assert (answer.status_code, answer.json()["errcode"]) == (502, "M_UNKNOWN")
            assert "own account" in answer.json()["error"]


def test_raw_fragment_is_an_alias_also_with_a_query(bridge: Bridge, upstream: Upstream) -> None:
    with RawClient(bridge.url) as client:
        target = "/join/#tutorial:upstream?access_token=t"
        client.send(f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        assert client.answer().status == 200
    assert asked(upstream) == [f"POST {V3}/join/{ALIAS}"]
