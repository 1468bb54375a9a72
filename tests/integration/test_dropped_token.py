"""A dead letter of the bot's, replayed after its token was dropped and the bridge restarted."""

import time
from pathlib import Path
from urllib.parse import quote

import httpx
from cryptography.fernet import Fernet
from sqlalchemy import update

from flowbridge.cli import replay
from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.settings import Settings
from flowbridge.store import Database
from flowbridge.store.delivery_log import Selection
from flowbridge.store.tables import tokens
from flowbridge.web.server import background
from tests.conftest import MakeRoom
from tests.patience import PATIENCE


def test_replay_after_the_bots_token_was_dropped_is_sent(
    synapse: LocalSynapse, bot: Account, friend: Account, make_room: MakeRoom, tmp_path: Path
) -> None:
    settings = Settings.load(
        base_url=synapse.url,
        access_token=bot.access_token,
        api_keys=["fb_key-of-32-characters-and-some-more"],
        database_url=f"sqlite:///{tmp_path}/flowbridge.db",
        secret_key=Fernet.generate_key().decode(),
    )
    room_id = quote(make_room(friend, preset="public_chat"), safe="")
    headers = {"X-API-Key": "fb_key-of-32-characters-and-some-more"}
    with background(settings) as url:
        sent = httpx.post(f"{url}/rooms/{room_id}/send/m.room.message", json="x", headers=headers, trust_env=False)
        assert sent.status_code == 403
    join = f"{synapse.url}/_matrix/client/v3/join/{room_id}"
    httpx.post(join, headers={"Authorization": f"Bearer {bot.access_token}"}, trust_env=False).raise_for_status()
    database = Database(settings.database_url.get_secret_value())
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        connection.execute(update(tokens).values(token=None))  # as `drop_idle_tokens` does after ten minutes
    database.engine.dispose()
    assert replay.replay_dead(settings, Selection(states=("dead",))) == 0
    with background(settings) as url:
        deadline = time.monotonic() + PATIENCE
        status = ""
        while status != "sent":
            assert time.monotonic() < deadline, httpx.get(f"{url}/readyz", trust_env=False).text
            time.sleep(0.1)
            status = httpx.get(f"{url}/deliveries", headers=headers, trust_env=False).json()["deliveries"][0]["status"]
