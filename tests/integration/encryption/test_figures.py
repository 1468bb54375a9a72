"""What /metrics and /readyz tell of encryption."""

import time
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.encryption.callers import CallerDevices
from flowbridge.encryption.devices import Devices
from flowbridge.encryption.keeper import Keeper, Status
from flowbridge.encryption.setup import HINTS, Report, Standing
from flowbridge.store import Database
from flowbridge.web.server import background
from tests.http.test_health import figures
from tests.integration.encryption.test_bridge import Bridge, settings
from tests.patience import until
from tests.peer import Peer

DECRYPTED, UNDECRYPTABLE = "flowbridge_events_decrypted_total", "flowbridge_events_undecryptable_total"


def test_figures_count_what_encryption_did(synapse: LocalSynapse, bot: Account, peer: Peer, tmp_path: Path) -> None:
    with background(settings(synapse, bot, tmp_path)) as url, closing(Bridge(url, synapse, bot)) as bridge:
        until(lambda: bridge.http.get("/readyz").json()["encryption"] == "signed")
        before = figures(bridge.http)
        room = bridge.room()
        peer.ask("join", room=room)
        unread = peer.send(room, {"msgtype": "m.text", "body": "hello"})
        sent = [bridge.say(room, str(number)) for number in range(3)]
        forged = {"algorithm": "m.megolm.v1.aes-sha2", "session_id": "none", "ciphertext": "AAAA"}
        bridge.direct.put(f"/rooms/{room}/send/m.room.encrypted/1", json=forged).raise_for_status()
        for number in range(2):
            content = {"algorithm": "rot13", "ciphertext": "uryyb"}
            bridge.direct.put(f"/rooms/{room}/send/m.room.encrypted/a{number}", json=content).raise_for_status()
        looked = time.monotonic()  # the peer's key has come once a sync has begun after this
        until(lambda: figures(bridge.http)["flowbridge_device_sync_seconds", ()] < time.monotonic() - looked)
        page = bridge.http.get(f"/rooms/{room}/messages", params={"limit": 20}).raise_for_status().json()["chunk"]
        assert {*sent, unread} <= {event["event_id"] for event in page}
        now = figures(bridge.http)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return now.get(key, 0) - before.get(key, 0)

    assert grown("flowbridge_events_encrypted_total") == 3
    assert grown("flowbridge_crypto_sessions_total", kind="room") == 1
    assert grown("flowbridge_crypto_sessions_total", kind="device") >= 1
    assert grown(DECRYPTED) == 4
    assert grown(UNDECRYPTABLE, reason="no_key") == 1
    assert grown(UNDECRYPTABLE, reason="algorithm") == 2
    assert now["flowbridge_device_held", ()] == 1
    assert 0 < now["flowbridge_device_sync_seconds", ()] < 60


STANDINGS: list[Standing] = ["signed", "unsigned", "foreign", "absent"]


@pytest.mark.parametrize("standing", STANDINGS)
def test_readiness_says_what_is_missing(standing: Standing) -> None:
    devices, keeper = stopped()
    keeper.status = Status("held", report=Report(standing, "@bot:hs", "DEVICE", "key"))
    assert (devices.standing, devices.missing) == (standing, HINTS[standing])
    assert bool(devices.missing) == (standing != "signed")


def test_readiness_says_why_there_is_no_device() -> None:
    devices, keeper = stopped()
    keeper.status = Status("failed", "the token's device has the keys of another client" + "." * 1_000)
    assert devices.missing.startswith("the token's device has the keys")
    assert len(devices.missing) == 300
    keeper.status = Status("elsewhere", "another process of the bridge holds the device")
    assert devices.missing == "", "nothing is to be done"


def stopped() -> tuple[Devices, Keeper]:
    class Stopped:
        status = Status("off")

    keeper = cast("Keeper", Stopped())
    return Devices(cast("Database", None), keeper, cast("CallerDevices", None), lambda: None), keeper
