"""The Synapse that demo, tests and benchmarks run on."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo import synapse as synapse_module
from flowbridge.cli.demo.synapse import Account, LocalSynapse, SynapseError, _free_port
from tests.conftest import MakeRoom
from tests.patience import until


@pytest.fixture
def client(synapse: LocalSynapse) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=synapse.url, trust_env=False) as http:
        yield http


def whoami(client: httpx.Client, account: Account) -> httpx.Response:
    headers = {"Authorization": f"Bearer {account.access_token}"}
    return client.get("/_matrix/client/v3/account/whoami", headers=headers)


def test_registered_user_is_logged_in(client: httpx.Client, bot: Account) -> None:
    assert whoami(client, bot).json() == {
        "user_id": bot.user_id,
        "device_id": bot.device_id,
        "is_guest": False,
    }


def test_password_logs_in(client: httpx.Client, bot: Account) -> None:
    body = {"type": "m.login.password", "user": bot.user_id, "password": bot.password}
    assert client.post("/_matrix/client/v3/login", json=body).json()["user_id"] == bot.user_id


def test_admin_may_use_the_admin_api(synapse: LocalSynapse, client: httpx.Client) -> None:
    admin = synapse.register("an-admin", admin=True)
    headers = {"Authorization": f"Bearer {admin.access_token}"}
    assert client.get(f"/_synapse/admin/v2/users/{admin.user_id}", headers=headers).json()["admin"] is True


def test_anybody_may_register_without_verification(client: httpx.Client) -> None:
    body = {"username": "walk-in", "password": "wordpass", "auth": {"type": "m.login.dummy"}}
    assert client.post("/_matrix/client/v3/register", json=body).json()["user_id"] == "@walk-in:localhost"


def test_register_says_why_when_refused(synapse: LocalSynapse) -> None:
    synapse.register("taken")
    with pytest.raises(SynapseError, match="M_USER_IN_USE"):
        synapse.register("taken")


def test_no_rate_limit_when_lifted(client: httpx.Client, bot: Account, make_room: MakeRoom) -> None:
    path = f"/_matrix/client/v3/rooms/{quote(make_room(bot), safe='')}/send/m.room.message"
    headers = {"Authorization": f"Bearer {bot.access_token}"}
    body = {"msgtype": "m.text", "body": "hello"}
    statuses = {client.put(f"{path}/{n}", json=body, headers=headers).status_code for n in range(30)}
    assert statuses == {200}


def test_secrets_stay_out_of_repr(bot: Account) -> None:
    assert bot.access_token not in repr(bot)
    assert bot.password not in repr(bot)


def test_restart_keeps_address_and_data_then_directory_goes() -> None:
    with LocalSynapse() as homeserver, httpx.Client(base_url=homeserver.url, trust_env=False) as client:
        account = homeserver.register("example")
        homeserver.stop()
        assert not answers(homeserver.url)
        homeserver.start()
        assert whoami(client, account).json()["user_id"] == "@example:localhost"
        directory = homeserver.directory
    assert not answers(homeserver.url)
    assert not directory.exists()


def test_synapses_own_rate_limits_when_asked_for() -> None:
    extra = {"rc_message": {"per_second": 1, "burst_count": 2}}
    with LocalSynapse(rate_limits=True, config=extra) as homeserver:
        settings = json.loads((homeserver.directory / "homeserver.yaml").read_text())
        assert {key: value for key, value in settings.items() if key.startswith("rc_")} == extra


def test_start_failure_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broken = LocalSynapse(config={"database": {"name": "no-such-database"}})
    with pytest.raises(SynapseError, match=r"ended with exit code 1(.|\n)*no-such-database"):
        broken.__enter__()
    assert list(tmp_path.iterdir()) == []


def test_another_port_is_tried_when_somebody_takes_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        choices = [_free_port(), other.getsockname()[1]]
        monkeypatch.setattr(synapse_module, "_free_port", choices.pop)
        with LocalSynapse() as homeserver:
            assert choices == []
            assert homeserver.register("example").user_id == "@example:localhost"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SynapseError, match=r"pip install 'flowbridge\[demo\]'"):
        LocalSynapse().__enter__()


def test_synapse_and_its_files_go_when_the_parent_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode().strip()
        assert answers(url)
        parent.kill()
    until(lambda: not answers(url) and list(tmp_path.iterdir()) == [])


PARENT = """
import time
from flowbridge.cli.demo.synapse import LocalSynapse
with LocalSynapse() as homeserver:
    print(homeserver.url, flush=True)
    time.sleep(600)
"""


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/_matrix/client/versions", trust_env=False).is_success
    except httpx.TransportError:
        return False
