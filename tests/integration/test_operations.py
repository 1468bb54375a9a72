"""What tells an operator how things stand, with a real homeserver behind."""

from pathlib import Path

import httpx

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import store_in
from tests.patience import until


def test_readyz_names_homeserver_and_bot(anyone: httpx.Client, synapse: LocalSynapse, owner: object) -> None:
    answer = anyone.get("/readyz").json()
    assert answer["ready"] is True
    assert answer["homeserver"] == synapse.url
    assert answer["bot"].startswith("@user-")


def test_versions_are_the_homeservers_own(anyone: httpx.Client, synapse: LocalSynapse) -> None:
    direct = httpx.get(f"{synapse.url}/_matrix/client/versions", trust_env=False)
    assert anyone.get("/_matrix/client/versions").json() == direct.json()


def test_bot_logs_in_with_its_password(
    synapse: LocalSynapse, make_account: MakeAccount, make_room: MakeRoom, tmp_path: Path
) -> None:
    account = make_account()
    room_id = make_room(account)
    settings = Settings.load(
        base_url=synapse.url,
        user=account.user_id,
        password=account.password,
        api_keys=["fb_key-of-32-characters-and-some-more"],
        access_token=None,
        database_url=store_in(tmp_path),
    )
    with background(settings) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(2):
            answer = client.post(
                f"/rooms/{room_id}/send/m.room.message",
                json="hello",
                headers={"X-API-Key": "fb_key-of-32-characters-and-some-more"},
            )
            assert answer.status_code == 200, answer.text


def test_bridge_recovers_when_the_homeserver_comes_back(tmp_path: Path) -> None:
    with LocalSynapse() as homeserver:
        account = homeserver.register("late")
        homeserver.stop()
        settings = Settings.load(
            base_url=homeserver.url, access_token=account.access_token, database_url=store_in(tmp_path)
        )
        with background(settings) as url, httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/healthz").status_code == 200
            not_ready = client.get("/readyz")
            assert not_ready.status_code == 503
            assert "cannot connect" in not_ready.json()["error"]
            homeserver.start()
            until(lambda: client.get("/readyz").status_code == 200)  # what it found is told for a second
            assert client.get("/readyz").json()["bot"] == account.user_id
