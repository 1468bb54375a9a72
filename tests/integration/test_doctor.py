"""`flowbridge doctor` on a real Synapse: the bot's rooms, dead letters, the proxy of the environment."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.cli.doctor import DEAD
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import Database
from flowbridge.web.server import background
from tests.conftest import MakeRoom
from tests.processes import run

Check = dict[str, str]
Doctor = Callable[..., tuple[int, list[Check]]]
KEY = "fb_key-of-32-characters-and-some-more"


@pytest.fixture
def doctor(synapse: LocalSynapse, bot: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """`doctor()`: its exit code and findings."""
    monkeypatch.chdir(tmp_path)
    assert run("init").returncode == 0

    def examine(**settings: str) -> tuple[int, list[Check]]:
        given = {"BASE_URL": synapse.url, "ACCESS_TOKEN": bot.access_token, **settings}
        done = run("doctor", "--json", **given)
        assert bot.access_token not in done.stdout + done.stderr
        return done.returncode, json.loads(done.stdout)

    return examine


def says(checks: list[Check], what: str) -> list[tuple[str, str]]:
    return [(check["state"], check["says"]) for check in checks if check["check"] == what]


def test_rooms_are_listed_with_what_keeps_the_bot_from_sending(
    doctor: Doctor, synapse: LocalSynapse, bot: Account, friend: Account, make_room: MakeRoom
) -> None:
    def state(type_: str, content: dict[str, Any], state_key: str = "") -> dict[str, Any]:
        return {"type": type_, "state_key": state_key, "content": content}

    code, checks = doctor()
    assert (code, says(checks, "room")) == (0, [])
    assert says(checks, "token")[0][1].endswith("it is in no room yet: invite it, or POST /join/{roomIdOrAlias}")

    quiet = {"events_default": 50}
    encryption = state("m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"})
    plain = make_room(bot, name="Ops", room_alias_name=f"ops-{bot.user_id[1:].partition(':')[0]}")
    encrypted = make_room(bot, initial_state=[encryption])
    own = make_room(bot, room_version="12", power_level_content_override=quiet)
    invited = make_room(friend, invite=[bot.user_id])
    silent = make_room(friend, preset="public_chat", power_level_content_override=quiet)
    old = make_room(bot, room_version="10")
    with httpx.Client(base_url=f"{synapse.url}/_matrix/client/v3", trust_env=False) as direct:
        direct.headers["Authorization"] = f"Bearer {bot.access_token}"
        direct.post(f"/join/{silent}", json={}).raise_for_status()
        new = direct.post(f"/rooms/{old}/upgrade", json={"new_version": "11"}).raise_for_status()

    code, checks = doctor()
    assert code == 0
    rooms = {text.split(" ")[0].rstrip(":"): (kind, text) for kind, text in says(checks, "room")}
    assert set(rooms) == {plain, encrypted, own, invited, silent, old, new.json()["replacement_room"]}
    assert rooms[plain][0] == "ok"
    assert rooms[plain][1].startswith(f"{plain} (Ops, #ops-")
    assert rooms[plain][1].endswith("): joined, takes messages")
    assert rooms[encrypted][0] == "note"
    assert "it is encrypted" in rooms[encrypted][1]
    assert rooms[own] == ("ok", f"{own}: joined, takes messages")
    assert rooms[invited] == (
        "note",
        f"{invited}: invited by {friend.user_id}, and not joined yet: POST /join/{invited}",
    )
    assert f"but {bot.user_id} may not send m.room.message" in rooms[silent][1]
    assert f"replaced by {new.json()['replacement_room']}: send there" in rooms[old][1]
    (allowed,) = [text for _, text in says(doctor(FLOWBRIDGE_ENCRYPTED_ROOMS="allow")[1], "room") if encrypted in text]
    assert allowed.endswith("takes messages, in plain text although it is encrypted")


def test_dead_letters_are_a_problem_that_goes_away_with_them(
    doctor: Doctor, synapse: LocalSynapse, bot: Account, make_room: MakeRoom, tmp_path: Path
) -> None:
    settings = Settings.load(
        base_url=synapse.url,
        access_token=bot.access_token,
        api_keys=KEY,
        encrypted_rooms="allow",
        database_url=f"sqlite:///{tmp_path}/flowbridge.db",
    )
    room = make_room(bot)
    with background(settings, timing=Timing()) as url:
        target = f"{url}/rooms/{room}/send/m.room.message"
        assert httpx.post(target, json="x", headers={"X-API-Key": KEY}, trust_env=False).status_code == 200
    assert doctor()[0] == 0
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open(shared=True)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE outbox SET state = 'dead'")
    database.engine.dispose()
    code, checks = doctor()
    assert code == 1
    ((kind, text),) = says(checks, "dead letters")
    assert (kind, text) == ("bad", f"1: {DEAD}")
    assert "`flowbridge deliveries list --state dead` says why" in text
    assert run("deliveries", "purge", "--state", "dead", "--yes").returncode == 0
    assert doctor()[0] == 0


def test_refused_token_and_missing_space_are_problems(doctor: Doctor, tmp_path: Path) -> None:
    code, checks = doctor(ACCESS_TOKEN="wrong")
    assert (code, [kind for kind, _ in says(checks, "token")]) == (1, ["bad"])
    code, checks = doctor(FLOWBRIDGE_MIN_FREE_DISK_BYTES=str(2**60))
    ((kind, text),) = says(checks, "store")
    assert (code, kind) == (1, "bad")
    assert text.startswith(f"{tmp_path}/flowbridge.db: 0 queued, 0 dead letters, ")
    assert text.endswith("TiB are left free): nothing more is accepted")
    code, checks = doctor(FLOWBRIDGE_MAX_DATABASE_BYTES="1")
    assert (code, says(checks, "store")[0][0]) == (1, "bad")


def test_rooms_of_hooks_without_the_bot_are_a_problem(
    doctor: Doctor, bot: Account, friend: Account, make_room: MakeRoom
) -> None:
    assert says(doctor()[1], "hooks") == []
    good, other = make_room(bot), make_room(friend)
    for name, room in (("good", good), ("one", other), ("two", other)):
        assert run("hooks", "create", name, "--room", room).returncode == 0
        if name == "good":
            assert says(doctor()[1], "hooks") == [("ok", "1; the bot is in their rooms")]
    code, checks = doctor()
    wrong = (
        f"one and 1 more: {bot.user_id} is not in {other}: invite it, or POST /join/{other}; until then messages wait"
    )
    assert (code, says(checks, "hooks")) == (1, [("bad", wrong)])


def test_keys_and_proxies_are_told(doctor: Doctor) -> None:
    code, checks = doctor(
        ALL_PROXY="http://user:secret@127.0.0.1:1", BASE_URL="http://hs.invalid", FLOWBRIDGE_ALLOW_HTTP="1"
    )
    assert code == 1
    assert says(checks, "proxy") == [
        ("note", "ALL_PROXY is not used: if the homeserver is behind that proxy, set FLOWBRIDGE_PROXY")
    ]
    code, checks = doctor(FLOWBRIDGE_PROXY="http://user:secret@127.0.0.1:1")
    assert code == 1
    assert says(checks, "address")[0][1].endswith(", through the proxy http://127.0.0.1:1")
    assert "cannot connect to the proxy http://127.0.0.1:1 (FLOWBRIDGE_PROXY)" in says(checks, "versions")[0][1]
    assert "secret" not in str(checks)
    none = "none yet: `flowbridge keys create` makes one, and so does the first `serve`"
    assert says(doctor()[1], "api keys") == [("note", none)]
    assert run("keys", "create").returncode == 0
    assert says(doctor()[1], "api keys") == [("ok", "1 in the store")]
