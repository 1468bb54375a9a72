"""`/deliveries` with a real homeserver behind, on each engine: seeing what became of events, and mending it."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from cryptography.fernet import Fernet
from jsonschema import Draft202012Validator

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys
from flowbridge.web.server import background
from tests.conftest import MakeAccount
from tests.http.conftest import Answer, RawClient
from tests.integration.conftest import Room
from tests.patience import PATIENCE
from tests.postgres import LocalPostgres

LEASE_SECONDS = 10 * PATIENCE  # the worker looks by itself, too, three times in a lease: no test waits for that
ADMIN, ONE, TWO = "fb_deliveries-admin", "fb_deliveries-one", "fb_deliveries-two"


COMPONENTS = json.loads((Path(__file__).parents[2] / "openapi.json").read_bytes())["components"]


def check(value: Any, schema: str) -> None:
    """As openapi.json has it, and with nothing that it does not name."""
    Draft202012Validator({"$ref": f"#/components/schemas/{schema}", "components": COMPONENTS}).validate(value)
    assert value.keys() <= COMPONENTS["schemas"][schema]["properties"].keys()


@dataclass(frozen=True)
class Log:
    """A caller of a bridge, and its view of the delivery log."""

    http: httpx.Client

    def send(self, room: Room | str, body: Any = "hello", event_type: str = "m.room.message", **headers: str) -> str:
        """Send an event, however that ends; the delivery's id."""
        path = room.path if isinstance(room, Room) else f"/rooms/{quote(room, safe='')}"
        answer = self.http.post(f"{path}/send/{event_type}", json=body, headers=headers)
        return answer.headers["Flowbridge-Delivery"]

    def list(self, **parameters: Any) -> list[str]:
        answer = self.http.get("/deliveries", params=parameters)
        assert answer.status_code == 200, answer.text
        check(answer.json(), "Deliveries")
        return [one["delivery_id"] for one in answer.json()["deliveries"]]

    def show(self, delivery: str) -> dict[str, Any]:
        answer = self.http.get(f"/deliveries/{delivery}")
        assert answer.status_code == 200, answer.text
        check(answer.json(), "DeliveryDetail")
        return dict(answer.json())

    def replay(self, delivery: str) -> httpx.Response:
        return self.http.post(f"/deliveries/{delivery}/replay")

    def delete(self, delivery: str) -> httpx.Response:
        return self.http.delete(f"/deliveries/{delivery}")

    def until(self, delivery: str, status: str) -> dict[str, Any]:
        """The delivery once it has this status."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.show(delivery))["status"] != status:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found


@dataclass(frozen=True)
class Bridge:
    url: str

    @contextmanager
    def caller(self, secret: str) -> Iterator[Log]:
        """With a bridge API key, or with a Matrix token."""
        headers = {"Authorization": f"Bearer {secret}"}
        with httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=PATIENCE) as client:
            yield Log(client)


@contextmanager
def running(database_url: str, homeserver_url: str, bot: Account, secret_key: str, **values: Any) -> Iterator[Bridge]:
    """A bridge whose store has an admin's key and two others."""
    database = Database(database_url)
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        for name, secret in (("admin", ADMIN), ("one", ONE), ("two", TWO)):
            api_keys.add(connection, ApiKey(name, admin=name == "admin"), secret)
    database.engine.dispose()
    settings = Settings.load(
        base_url=homeserver_url,
        access_token=bot.access_token,
        database_url=database_url,
        secret_key=secret_key,
        **{"wait_seconds": PATIENCE, "lease_seconds": LEASE_SECONDS, **values},
    )
    with background(settings) as url:
        yield Bridge(url)


@pytest.fixture(scope="module")
def secret_key() -> str:
    return Fernet.generate_key().decode()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """`new_url()`: a new database's."""
    if request.param == "postgresql":
        server: LocalPostgres = request.getfixturevalue("postgres")
        return server.fresh_database
    return lambda: f"sqlite:///{tmp_path_factory.mktemp('deliveries')}/flowbridge.db"


@pytest.fixture(scope="module")
def log_bridge(new_url: Callable[[], str], synapse: LocalSynapse, owner: Account, secret_key: str) -> Iterator[Bridge]:
    with running(new_url(), synapse.url, owner, secret_key) as bridge:
        yield bridge


@pytest.fixture
def admin(log_bridge: Bridge) -> Iterator[Log]:
    with log_bridge.caller(ADMIN) as log:
        yield log


@pytest.fixture
def one(log_bridge: Bridge) -> Iterator[Log]:
    with log_bridge.caller(ONE) as log:
        yield log


@pytest.fixture
def two(log_bridge: Bridge) -> Iterator[Log]:
    with log_bridge.caller(TWO) as log:
        yield log


@pytest.fixture
def closed_room(new_room: Callable[..., Room], friend: Account, synapse: LocalSynapse) -> Iterator[Room]:
    """A friend's room, which the bot is not in: what is sent there dies."""
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        headers = {"Authorization": f"Bearer {friend.access_token}"}
        made = direct.post("/_matrix/client/v3/createRoom", json={"preset": "public_chat"}, headers=headers)
        yield Room(made.raise_for_status().json()["room_id"], friend, direct)


def join(room: Room, account: Account) -> None:
    headers = {"Authorization": f"Bearer {account.access_token}"}
    room.direct.post(f"/_matrix/client/v3/join/{quote(room.id, safe='')}", headers=headers).raise_for_status()


# seeing


def test_sent_event_is_shown_with_its_request_and_its_attempt(admin: Log, room: Room, owner: Account) -> None:
    body = {"payload": "hello <b>you</b>", "topic": "t"}
    delivery = admin.send(room, body)
    found = admin.until(delivery, "sent")
    seen = room.event(found["event_id"])
    assert found == {
        "delivery_id": delivery,
        "status": "sent",
        "room_id": room.id,
        "event_type": "m.room.message",
        "event_id": seen["event_id"],
        "attempts": 1,
        "accepted_at": found["accepted_at"],
        "settled_at": found["settled_at"],
        "user_id": owner.user_id,
        "api_key": "admin",
        "request": found["request"],
        "event": {"type": "m.room.message", "content": {"msgtype": "m.text", "body": "hello <b>you</b>"}},
        "txn_id": seen["unsigned"]["transaction_id"],
        "history": found["history"],
    }
    assert httpx.Response(200, text=found["request"]).json() == body
    assert [entry["status"] for entry in found["history"]] == [200]
    assert found["history"][0]["milliseconds"] >= 0
    assert found["accepted_at"] <= found["history"][0]["time"] <= found["settled_at"]
    assert [one for one in admin.http.get("/deliveries").json()["deliveries"] if one["delivery_id"] == delivery] == [
        {key: value for key, value in found.items() if key not in ("request", "event", "txn_id", "history")}
    ]


def test_state_event_is_shown_with_its_state_key(admin: Log, room: Room) -> None:
    found = admin.until(admin.send(room, {"topic": "hello"}, "m.room.topic"), "sent")
    assert found["state_key"] == ""
    assert found["event"] == {"type": "m.room.topic", "state_key": "", "content": {"topic": "hello"}}


def test_refused_event_is_a_dead_letter_with_the_homeservers_words(admin: Log, closed_room: Room) -> None:
    found = admin.until(admin.send(closed_room), "dead")
    assert (found["error"]["status"], found["error"]["errcode"]) == (403, "M_FORBIDDEN")
    assert found["error"]["error"]
    assert [(entry["status"], entry["errcode"]) for entry in found["history"]] == [(403, "M_FORBIDDEN")]
    assert "event_id" not in found


def test_answers_are_json_for_nobody_to_keep(admin: Log, room: Room) -> None:
    delivery = admin.send(room, "<script>alert(1)</script>")
    for path in ("/deliveries", f"/deliveries/{delivery}"):
        answer = admin.http.get(path)
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        head = admin.http.head(path)
        assert (head.status_code, head.content, head.headers["Content-Type"]) == (200, b"", "application/json")
    assert admin.http.head("/deliveries/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/deliveries", "/deliveries/x"])
def test_nobody_is_shown_nothing(log_bridge: Bridge, path: str) -> None:
    with httpx.Client(base_url=log_bridge.url, trust_env=False) as client:
        answers = [client.get(path), client.get(path, headers={"Authorization": "Bearer syt_wrong"})]
        answers += [client.get(path, headers={"X-API-Key": "fb_wrong"})]
    assert [(answer.status_code, answer.json()["errcode"]) for answer in answers] == [
        (401, "M_MISSING_TOKEN"),
        (401, "M_UNKNOWN_TOKEN"),
        (401, "M_UNKNOWN_TOKEN"),
    ]


# filters and pages


def test_filters_leave_what_meets_them_all(admin: Log, room: Room, closed_room: Room) -> None:
    dead = admin.send(closed_room)
    sent = admin.send(room)
    topic = admin.send(room, {"topic": "t"}, "m.room.topic")
    accepted = {
        delivery: admin.until(delivery, "dead" if delivery == dead else "sent") for delivery in (dead, sent, topic)
    }
    assert admin.list(room_id=room.id) == [topic, sent]
    assert admin.list(room_id=closed_room.id) == [dead]
    assert admin.list(room_id=room.id, event_type="m.room.topic") == [topic]
    assert admin.list(room_id=room.id, state="dead") == []
    assert admin.list(limit=3) == [topic, sent, dead]
    assert admin.list(limit=3, state="sent,dead") == [topic, sent, dead]
    assert admin.list(limit=3, state=["sent", "dead"]) == [topic, sent, dead]
    assert admin.list(state="dead", limit=1) == [dead]
    assert dead not in admin.list(state="sent")
    assert dead not in admin.list(state="queued")
    assert admin.list(since=accepted[sent]["accepted_at"], limit=2) == [topic, sent]
    assert admin.list(until=accepted[dead]["accepted_at"], room_id=closed_room.id) == []
    assert admin.list(since=accepted[topic]["accepted_at"].replace("Z", "+00:00"), room_id=closed_room.id) == []
    blank = admin.list(state="", room_id="", event_type="", since="", until="", limit="", cursor=" ")
    assert blank[:3] == [topic, sent, dead]


def test_pages_are_stable_while_events_come(admin: Log, room: Room) -> None:
    sent = [admin.send(room) for _ in range(5)]
    first = admin.http.get("/deliveries", params={"room_id": room.id, "limit": 2}).json()
    later = [admin.send(room) for _ in range(3)]
    found = [one["delivery_id"] for one in first["deliveries"]]
    page = first
    while "next" in page:
        page = admin.http.get("/deliveries", params={"room_id": room.id, "limit": 2, "cursor": page["next"]}).json()
        found += [one["delivery_id"] for one in page["deliveries"]]
    assert found == sent[::-1]
    assert admin.list(room_id=room.id) == [*later[::-1], *sent[::-1]]


# whose they are


def test_keys_see_their_own_and_users_theirs(
    log_bridge: Bridge, admin: Log, one: Log, two: Log, room: Room, make_account: MakeAccount
) -> None:
    alice, bob = make_account(), make_account()
    with log_bridge.caller(alice.access_token) as of_alice, log_bridge.caller(bob.access_token) as of_bob:
        mine = {log: log.send(room) for log in (one, two, of_alice, of_bob)}
        for log, delivery in mine.items():
            assert admin.show(delivery)["delivery_id"] == delivery
            for other, others in mine.items():
                if other is log:
                    assert log.list(room_id=room.id) == [delivery]
                    assert log.show(delivery)["room_id"] == room.id
                else:
                    answers = [log.http.get(f"/deliveries/{others}"), log.replay(others), log.delete(others)]
                    never = [log.http.get("/deliveries/never"), log.replay("never"), log.delete("never")]
                    assert [answer.status_code for answer in answers] == [404, 404, 404]
                    assert [answer.content for answer in answers] == [answer.content for answer in never]
        assert set(admin.list(room_id=room.id)) == set(mine.values())
        assert {admin.show(delivery)["status"] for delivery in (mine[one], mine[two])} == {"sent"}


def test_users_other_device_sees_and_replays_too(
    log_bridge: Bridge, synapse: LocalSynapse, closed_room: Room, make_account: MakeAccount
) -> None:
    alice = make_account()
    with log_bridge.caller(alice.access_token) as phone:
        delivery = phone.send(closed_room)
        phone.until(delivery, "dead")
    join(closed_room, alice)
    login = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": alice.user_id},
        "password": alice.password,
    }
    client = closed_room.direct
    token = client.post("/_matrix/client/v3/login", json=login).raise_for_status().json()["access_token"]
    headers = {"Authorization": f"Bearer {alice.access_token}"}
    client.post("/_matrix/client/v3/logout", headers=headers).raise_for_status()
    with log_bridge.caller(token) as desk:
        assert desk.list() == [delivery]
        assert desk.replay(delivery).status_code == 202
        event_id = desk.until(delivery, "sent")["event_id"]
    assert closed_room.event(event_id)["sender"] == alice.user_id


# mending


def test_dead_letter_is_replayed_once_its_cause_is_gone(
    admin: Log, one: Log, closed_room: Room, owner: Account
) -> None:
    delivery = one.send(closed_room, {"body": "at last", "msgtype": "m.text"}, **{"Idempotency-Key": "k"})
    dead = one.until(delivery, "dead")
    join(closed_room, owner)
    answer = one.replay(delivery)
    assert (answer.status_code, answer.json()) == (202, {"delivery_id": delivery, "status": "queued"})
    assert answer.headers["Location"] == f"/deliveries/{delivery}"
    sent = one.until(delivery, "sent")
    assert closed_room.event(sent["event_id"])["content"] == {"body": "at last", "msgtype": "m.text"}
    assert sent["txn_id"] != dead["txn_id"]
    assert sent["accepted_at"] > dead["settled_at"]
    first, replayed, last = sent["history"]
    assert (first["status"], last["status"]) == (403, 200)
    assert replayed["replayed"] == {
        "by": "key:one", "status": "dead", "txn_id": dead["txn_id"], "accepted_at": dead["accepted_at"],
    }  # fmt: skip
    assert (sent["attempts"], sent["api_key"], "error" in sent) == (1, "one", False)
    assert admin.list(room_id=closed_room.id) == [delivery]
    again = one.http.post(
        f"{closed_room.path}/send/m.room.message",
        json={"body": "at last", "msgtype": "m.text"},
        headers={"Idempotency-Key": "k"},
    )
    assert (again.json(), again.headers["Flowbridge-Delivery"]) == ({"event_id": sent["event_id"]}, delivery)


def test_sent_event_replayed_is_another_event(admin: Log, room: Room) -> None:
    delivery = admin.send(room, "twice")
    first = admin.until(delivery, "sent")
    assert admin.replay(delivery).status_code == 202
    second = admin.until(delivery, "sent")
    assert first["event_id"] != second["event_id"]
    assert [room.event(found["event_id"])["content"]["body"] for found in (first, second)] == ["twice", "twice"]
    assert second["history"][-2]["replayed"]["event_id"] == first["event_id"]


def test_dead_letters_replayed_in_order_arrive_in_order(admin: Log, closed_room: Room, owner: Account) -> None:
    deliveries = [admin.send(closed_room, str(number)) for number in range(5)]
    for delivery in deliveries:
        admin.until(delivery, "dead")
    join(closed_room, owner)
    for delivery in deliveries[::-1]:
        assert admin.replay(delivery).status_code == 202
    stamps = [closed_room.event(admin.until(one, "sent")["event_id"])["origin_server_ts"] for one in deliveries[::-1]]
    assert stamps == sorted(stamps)


def test_settled_deliveries_are_deleted(admin: Log, room: Room, closed_room: Room) -> None:
    for delivery, status in ((admin.send(room), "sent"), (admin.send(closed_room), "dead")):
        admin.until(delivery, status)
        answer = admin.delete(delivery)
        assert (answer.status_code, answer.json()) == (200, {})
        assert admin.http.get(f"/deliveries/{delivery}").status_code == 404
        assert admin.delete(delivery).status_code == 404
        assert admin.replay(delivery).status_code == 404


# while the homeserver is away


@pytest.fixture
def lonely(new_url: Callable[[], str], owner: Account, secret_key: str) -> Iterator[Callable[..., Any]]:
    """A bridge whose homeserver does not answer, but which knows its bot from earlier."""
    with LocalSynapse(rate_limits=False) as homeserver:
        bot = homeserver.register("bot")
        headers = {"Authorization": f"Bearer {bot.access_token}"}
        made = httpx.post(f"{homeserver.url}/_matrix/client/v3/createRoom", json={}, headers=headers, trust_env=False)
        with running(new_url(), homeserver.url, bot, secret_key) as bridge, bridge.caller(ONE) as log:
            room_id = made.raise_for_status().json()["room_id"]
            log.until(log.send(room_id), "sent")
            homeserver.stop()
            yield lambda: (log, room_id, homeserver)


def test_key_sees_what_is_queued_while_the_homeserver_is_away(lonely: Callable[..., Any]) -> None:
    log, room_id, homeserver = lonely()
    first, second, third = (log.send(room_id, str(n), Prefer="respond-async") for n in range(3))
    assert log.list(state="queued") == [third, second, first]
    refused = log.replay(first)
    assert (refused.status_code, refused.json()["errcode"]) == (409, "M_BAD_STATE")
    assert log.delete(second).status_code == 200
    assert log.http.get(f"/deliveries/{second}").status_code == 404
    homeserver.start()
    assert [log.until(delivery, "sent")["event"]["content"]["body"] for delivery in (first, third)] == ["0", "2"]


# attackers

HARMFUL = [
    "' OR '1'='1",
    "'; DROP TABLE outbox; --",
    '" OR ""="',
    "%",
    "_",
    "\\",
    "\0",
    "a\0b",
    "!a\0b:hs",
    "!' OR 1=1 --:hs",
    "\r\nX: y",
    "\x1b[31m",
    "١٢",  # digits, but not ours
    "-1",
    "0",
    "201",
    "1e3",
    "0x10",
    "999999999999999999999999",
    "9" * 5_000,
    "9223372036854775808",
    "NaN",
    "None",
    "null",
    "{}",
    "[]",
    "../../etc/passwd",
    "${jndi:ldap://x}",
    "<script>alert(1)</script>",
    "é",
    "\U0001f600",
    "!" + "x" * 300,
    "x" * 20_000,
    "__________8",
    "2026-02-30",
    "99999-01-01T00:00:00Z",
]


@pytest.mark.parametrize("name", ["state", "room_id", "event_type", "since", "until", "limit", "cursor", "other"])
def test_harmful_parameters_are_refused_or_find_nothing(one: Log, room: Room, name: str) -> None:
    delivery = one.send(room)
    for value in HARMFUL:
        answer = one.http.get("/deliveries", params={name: value})
        said = f"{name}={value[:80]!r}: {answer.status_code} {answer.text[:300]}"
        if answer.status_code == 400:
            assert answer.json()["errcode"] == "M_INVALID_PARAM", said
            assert name in answer.json()["error"], said
            assert len(answer.json()["error"]) < 1_000, said
        else:
            assert answer.status_code == 200, said
            assert name in ("room_id", "event_type", "other"), said
            assert name == "other" or answer.json() == {"deliveries": []}, said
    assert one.show(delivery)["delivery_id"] == delivery


def say(bridge: Bridge, method: str, target: str) -> Answer:
    """A request whose target nobody tidies up on the way."""
    with RawClient(bridge.url) as client:
        head = f"{method} {target} HTTP/1.1\r\nHost: bridge\r\nX-API-Key: {ONE}\r\n\r\n"
        return client.send(head.encode("latin-1")).answer(method)


@pytest.mark.parametrize("raw", ["%ff", "%c3", "%ed%a0%80", "%00", "\xff", "%", "%zz", "%f0%9f%98"])
def test_parameters_that_are_no_text_are_refused(log_bridge: Bridge, raw: str) -> None:
    for name in ("state", "room_id", "event_type", "since", "until", "limit", "cursor"):
        answer = say(log_bridge, "GET", f"/deliveries?{name}={raw}")
        if name == "event_type" and raw in ("%", "%zz"):
            assert answer.json() == {"deliveries": []}
            continue
        assert (answer.status, answer.json()["errcode"][:2]) == (400, "M_"), answer.body
        assert raw == "\xff" or name in answer.json()["error"]


@pytest.mark.parametrize("name", ["room_id", "event_type", "since", "until", "limit", "cursor"])
def test_parameter_that_is_there_twice_is_refused(one: Log, name: str) -> None:
    answer = one.http.get(f"/deliveries?{name}=1&{name}=1")
    assert (answer.status_code, answer.json()["error"]) == (400, f"{name}: it is there twice")


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("HEAD", ""), ("DELETE", ""), ("POST", "/replay")])
def test_harmful_ids_are_unknown(log_bridge: Bridge, one: Log, room: Room, method: str, suffix: str) -> None:
    delivery = one.send(room)
    harmful = [quote(value, safe="") for value in HARMFUL]
    harmful += ["%ff", "%", "%zz", "%ed%a0%80", "", ".", "..", "%2e%2e", "*", f"{delivery}%00", f"{delivery}%20"]
    for segment in harmful:
        answer = say(log_bridge, method, f"/deliveries/{segment}{suffix}")
        assert answer.status == 404, f"{segment[:80]}: {answer.status} {answer.body[:200]!r}"
    assert one.show(delivery)["delivery_id"] == delivery


def test_room_named_by_its_alias_is_refused_and_told_why(one: Log) -> None:
    answer = one.http.get("/deliveries", params={"room_id": "#alias:localhost"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("room_id: ")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/deliveries"), ("PUT", "/deliveries/x"), ("GET", "/deliveries/x/replay")]
)
def test_other_methods_are_not_served(one: Log, method: str, path: str) -> None:
    answer = one.http.request(method, path)
    assert (answer.status_code, answer.json()["errcode"]) == (405, "M_UNRECOGNIZED")
