"""An account is its user: what was accepted with one token goes out with the next one, against a real Synapse."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import Room
from tests.patience import until
from tests.processes import free_port, run, serving
from tests.upstream import Behaviour, Request, Upstream, encoded, hang_up
from tests.upstream import raw as answering

KEY = "fb_" + "k" * 40
SECRET = Fernet.generate_key().decode()
ASYNC = {"Prefer": "respond-async"}
MATRIX = "/_matrix/client/v3"
PATIENCE = 60.0
DROPPED = {"host", "content-length", "connection", "transfer-encoding", "accept-encoding", "content-encoding"}


class Door(Upstream):
    """The way to a Synapse: it can be shut, and answers to sends can get lost on it."""

    def __init__(self, url: str) -> None:
        super().__init__(self._pass, ports=[free_port()])  # one that no outgoing connection gets while the door is shut
        self._far = httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE)
        self.loses = threading.Event()
        self.lost = threading.Event()

    def __exit__(self, *_: object) -> None:
        super().__exit__(*_)
        self._far.close()

    def _pass(self, request: Request) -> Behaviour:
        headers = [(name, value) for name, value in request.headers if name not in DROPPED]
        answer = self._far.request(request.method, request.target, headers=headers, content=request.body)
        if self.loses.is_set() and "/send/" in request.target:
            self.lost.set()
            return hang_up
        lines = [f"{name}: {value}" for name, value in answer.headers.items() if name.lower() not in DROPPED]
        return answering(encoded(answer.status_code, answer.content, *lines))

    def shut(self) -> None:
        self.refuse()
        self.drop()

    def open(self) -> None:
        self.loses.clear()
        self.listen()


@pytest.fixture
def door(synapse: LocalSynapse) -> Iterator[Door]:
    with Door(synapse.url) as door:
        yield door


@pytest.fixture
def user(make_account: MakeAccount) -> Account:
    return make_account()


@pytest.fixture
def room(synapse: LocalSynapse, user: Account, make_account: MakeAccount, make_room: MakeRoom) -> Iterator[Room]:
    """A room of the user, seen by somebody whose token stays."""
    watcher = make_account()
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        room_id = make_room(user, preset="public_chat")
        join = direct.post(f"{MATRIX}/join/{room_id}", json={}, headers=bearer(watcher))
        join.raise_for_status()
        yield Room(room_id, watcher, direct)


def bearer(account: Account) -> dict[str, str]:
    return {"Authorization": f"Bearer {account.access_token}"}


def login(synapse: LocalSynapse, account: Account, device_id: str | None = None) -> Account:
    """The same user with another token; on another device, unless one is named."""
    wish: dict[str, Any] = {"type": "m.login.password", "password": account.password}
    wish["identifier"] = {"type": "m.id.user", "user": account.user_id}
    if device_id is not None:
        wish["device_id"] = device_id
    found = httpx.post(f"{synapse.url}{MATRIX}/login", json=wish, trust_env=False).raise_for_status().json()
    return replace(account, access_token=found["access_token"], device_id=found["device_id"])


def logout(synapse: LocalSynapse, account: Account) -> None:
    url = f"{synapse.url}{MATRIX}/logout"
    httpx.post(url, json={}, headers=bearer(account), trust_env=False).raise_for_status()


@contextmanager
def bridge(homeserver: str, store: str, **settings: Any) -> Iterator[httpx.Client]:
    """A bridge, and a caller with its API key."""
    given = {"base_url": homeserver, "database_url": store, "api_keys": [KEY], "secret_key": SECRET, **settings}
    with (
        background(Settings.load(**given)) as url,
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}, trust_env=False, timeout=PATIENCE) as caller,
    ):
        yield caller


def send(caller: httpx.Client, room: Room, body: str, **headers: str) -> httpx.Response:
    content = {"msgtype": "m.text", "body": body}
    return caller.post(f"{room.path}/send/m.room.message", json=content, headers=headers)


def keep(caller: httpx.Client, room: Room, *bodies: str, **headers: str) -> list[str]:
    """Have them accepted, and no more than that; where their deliveries are."""
    answers = [send(caller, room, body, **ASYNC, **headers) for body in bodies]
    assert [answer.status_code for answer in answers] == [202] * len(bodies), [answer.text for answer in answers]
    return [answer.headers["location"] for answer in answers]


def arrive(room: Room, *bodies: str) -> None:
    until(lambda: len(room.bodies()) >= len(bodies), else_=room.bodies)
    assert room.bodies() == list(bodies)


def status(caller: httpx.Client, location: str) -> str:
    return str(caller.get(location).raise_for_status().json()["status"])


# the bot


@pytest.mark.parametrize("same_device", [False, True])
@pytest.mark.parametrize("first", ["lost", "away"])
def test_what_a_token_left_behind_goes_out_with_the_next_one(
    synapse: LocalSynapse, door: Door, user: Account, room: Room, empty_url: str, first: str, *, same_device: bool
) -> None:
    with bridge(door.url, empty_url, access_token=user.access_token) as caller:
        assert send(caller, room, "before").status_code == 200
        if first == "lost":  # the homeserver takes the first one, and nobody hears of it
            door.loses.set()
            kept = keep(caller, room, "one")
            assert door.lost.wait(PATIENCE)
            door.shut()
        else:
            door.shut()
            kept = keep(caller, room, "one")
        kept += keep(caller, room, "two", "three")
    new = login(synapse, user, user.device_id if same_device else None)
    if not same_device:
        logout(synapse, user)
    door.open()
    with bridge(door.url, empty_url, access_token=new.access_token) as caller:
        assert send(caller, room, "after").status_code == 200
        arrive(room, "before", "one", "two", "three", "after")
        until(lambda: [status(caller, location) for location in kept] == ["sent"] * 3)
        assert caller.get("/readyz").status_code == 200


def test_renewed_token_is_needed_by_nobody_who_calls(
    synapse: LocalSynapse, door: Door, user: Account, room: Room, empty_url: str
) -> None:
    """The events go out by themselves, and are not overtaken by what is accepted later."""
    with bridge(door.url, empty_url, access_token=user.access_token) as caller:
        assert send(caller, room, "before").status_code == 200
        door.shut()
        keep(caller, room, "one")
    new = login(synapse, user)
    logout(synapse, user)
    door.open()
    with bridge(door.url, empty_url, access_token=new.access_token):
        arrive(room, "before", "one")


def test_token_is_read_again_from_its_file_when_it_is_refused(
    synapse: LocalSynapse, user: Account, room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(user.access_token)
    monkeypatch.setenv("ACCESS_TOKEN_FILE", str(file))
    with bridge(synapse.url, f"sqlite:///{tmp_path}/flowbridge.db") as caller:
        assert send(caller, room, "before").status_code == 200
        assert caller.get("/readyz").status_code == 200
        new = login(synapse, user)
        logout(synapse, user)
        until(lambda: caller.get("/readyz").status_code == 503)  # whether or not anything waits
        assert caller.get("/readyz").json()["flowbridge"]["failed"] == "bot"
        keep(caller, room, "one")
        waited = send(caller, room, "two", Prefer="wait=1")
        assert waited.status_code == 202, waited.text
        assert status(caller, waited.headers["location"]) == "queued"
        file.write_text(new.access_token + "\n")
        arrive(room, "before", "one", "two")
        assert send(caller, room, "three").status_code == 200
        until(lambda: caller.get("/readyz").status_code == 200)


def test_token_is_read_again_from_its_file_on_sighup(
    synapse: LocalSynapse, user: Account, room: Room, tmp_path: Path
) -> None:
    file, log = tmp_path / "token", tmp_path / "log"
    file.write_text(user.access_token)
    settings = {"BASE_URL": synapse.url, "ACCESS_TOKEN_FILE": str(file), "FLOWBRIDGE_API_KEYS": KEY}
    with (
        serving(cwd=tmp_path, log=log, **settings) as (url, process),
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}, trust_env=False, timeout=PATIENCE) as caller,
    ):
        assert send(caller, room, "before").status_code == 200
        new = login(synapse, user)
        file.write_text("no_token_at_all")
        process.send_signal(signal.SIGHUP)
        until(lambda: "bot_token_not_taken" in log.read_text())
        assert send(caller, room, "still").status_code == 200
        file.write_text(new.access_token)
        process.send_signal(signal.SIGHUP)
        until(lambda: "bot_token_taken" in log.read_text())
        assert caller.get("/whoami").json()["device_id"] == new.device_id
        logout(synapse, user)
        assert send(caller, room, "after").status_code == 200
        assert room.bodies() == ["before", "still", "after"]


def test_password_is_read_again_from_its_file_when_it_is_refused(
    synapse: LocalSynapse, user: Account, room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text(user.password)
    monkeypatch.setenv("FLOWBRIDGE_PASSWORD_FILE", str(file))
    with bridge(synapse.url, f"sqlite:///{tmp_path}/flowbridge.db", user=user.user_id) as caller:
        assert send(caller, room, "before").status_code == 200
        change_password(synapse.url, login(synapse, user), "a new one of eight or more")
        keep(caller, room, "one")
        until(lambda: caller.get("/readyz").status_code == 503)
        file.write_text("a new one of eight or more")
        arrive(room, "before", "one")


def test_doctor_says_whose_events_wait_for_a_token(
    synapse: LocalSynapse, door: Door, user: Account, room: Room, make_account: MakeAccount, tmp_path: Path
) -> None:
    store, bot = f"sqlite:///{tmp_path}/flowbridge.db", make_account()
    with bridge(door.url, store, access_token=bot.access_token) as caller:
        door.shut()
        with suppress(httpx.HTTPError):
            send(caller, room, "nothing")
        door.open()
        headers = {**bearer(user), "X-API-Key": ""}
        assert caller.get("/whoami", headers=headers).status_code == 200
        door.shut()
        keep(caller, room, "one", "two", **headers)
    settings = {"BASE_URL": synapse.url, "FLOWBRIDGE_DATABASE_URL": store, "FLOWBRIDGE_SECRET_KEY": SECRET}
    assert "wait for a token" not in run("doctor", ACCESS_TOKEN=bot.access_token, **settings).stdout
    logout(synapse, user)
    done = run("doctor", ACCESS_TOKEN=bot.access_token, **settings)
    assert f"2 events wait for a token of {user.user_id}" in done.stdout
    assert done.returncode == 1
    assert "BAD  token" in run("doctor", ACCESS_TOKEN=user.access_token, **settings).stdout


# callers


@pytest.mark.parametrize("call", ["send", "whoami", "pass through"])
def test_events_of_a_logged_out_device_go_out_when_another_one_calls(
    synapse: LocalSynapse, door: Door, user: Account, room: Room, empty_url: str, call: str
) -> None:
    phone, desk = login(synapse, user), login(synapse, user)
    given: dict[str, Any] = {"base_url": door.url, "database_url": empty_url, "secret_key": SECRET}
    with (
        background(Settings.load(**given)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as caller,
    ):
        assert send(caller, room, "before", **bearer(phone)).status_code == 200
        door.shut()
        keep(caller, room, "one", "two", **bearer(phone))
        logout(synapse, phone)
        door.open()
        until(lambda: "accounts_paused 1.0" in metrics(caller))
        if call == "send":
            assert send(caller, room, "after", **bearer(desk)).status_code == 200
            arrive(room, "before", "one", "two", "after")
            return
        path = "/whoami" if call == "whoami" else f"{MATRIX}/joined_rooms"
        assert caller.get(path, headers=bearer(desk)).status_code == 200
        arrive(room, "before", "one", "two")


def metrics(caller: httpx.Client) -> str:
    return caller.get("/metrics").text.replace("flowbridge_", "")


def test_caller_who_waits_hears_that_its_token_was_logged_out(
    synapse: LocalSynapse, user: Account, room: Room, tmp_path: Path
) -> None:
    """It does not send with another token of its user."""
    phone, desk = login(synapse, user), login(synapse, user)
    given: dict[str, Any] = {"base_url": synapse.url, "database_url": f"sqlite:///{tmp_path}/flowbridge.db"}
    with (
        background(Settings.load(**given)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as caller,
    ):
        for device in (desk, phone):
            assert send(caller, room, device.device_id, **bearer(device)).status_code == 200
        logout(synapse, phone)
        answer = send(caller, room, "late", **bearer(phone))
        assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
        assert send(caller, room, "good", **bearer(desk)).status_code == 200
        assert room.bodies() == [desk.device_id, phone.device_id, "good"]


# tokens that end through the bridge


def with_password(url: str, account: Account, method: str, path: str, body: dict[str, Any]) -> None:
    """A call that asks for the password."""
    auth = {"type": "m.login.password", "password": account.password}
    auth["identifier"] = {"type": "m.id.user", "user": account.user_id}  # type: ignore[assignment]
    with httpx.Client(base_url=url, headers=bearer(account), trust_env=False, timeout=PATIENCE) as client:
        first = client.request(method, path, json=body)
        assert first.status_code == 401, first.text
        done = client.request(method, path, json={**body, "auth": {**auth, "session": first.json()["session"]}})
        assert done.status_code == 200, done.text


def change_password(url: str, account: Account, password: str) -> None:
    with_password(url, account, "POST", f"{MATRIX}/account/password", {"new_password": password})


def log_out_everywhere(url: str, account: Account, other: Account) -> None:
    httpx.post(f"{url}/logout/all", headers=bearer(account), trust_env=False).raise_for_status()


def delete_device(url: str, account: Account, other: Account) -> None:
    with_password(url, account, "DELETE", f"{MATRIX}/devices/{other.device_id}", {})


ENDS: dict[str, Callable[[str, Account, Account], None]] = {
    "logout/all": log_out_everywhere,
    "password": lambda url, account, _: change_password(url, account, "a new one of eight or more"),
    "DELETE devices": delete_device,
    "delete_devices": lambda url, account, other: with_password(
        url, account, "POST", "/_matrix/client/r0/delete_devices", {"devices": [other.device_id]}
    ),
    "deactivate": lambda url, account, _: with_password(
        url, account, "POST", f"{MATRIX}/account/deactivate", {"erase": False}
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_other_tokens_that_a_user_ends_through_the_bridge_are_asked_for_at_once(
    synapse: LocalSynapse, user: Account, room: Room, tmp_path: Path, how: str
) -> None:
    phone, desk = login(synapse, user), login(synapse, user)
    given: dict[str, Any] = {"base_url": synapse.url, "database_url": f"sqlite:///{tmp_path}/flowbridge.db"}
    with (
        background(Settings.load(**given)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as caller,
    ):
        keep(caller, room, "one", **bearer(phone))
        arrive(room, "one")
        ENDS[how](url, desk, phone)
        answer = send(caller, room, "late", **ASYNC, **bearer(phone))
        assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN")
        assert room.bodies() == ["one"]


def test_live_stream_of_a_token_that_its_user_ends_through_the_bridge_ends_at_once(
    synapse: LocalSynapse, user: Account, tmp_path: Path
) -> None:
    """Synapse tells a long poll of a new password only with the next one, after up to 30 s."""
    phone, desk = login(synapse, user), login(synapse, user)
    given: dict[str, Any] = {"base_url": synapse.url, "database_url": f"sqlite:///{tmp_path}/flowbridge.db"}
    with (
        background(Settings.load(**given)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as caller,
        caller.stream("GET", "/live", headers=bearer(phone)) as stream,
    ):
        assert stream.status_code == 200
        change_password(url, desk, "a new one of eight or more")
        began = time.monotonic()
        for _ in stream.iter_raw():
            pass
        assert time.monotonic() < began + 15
