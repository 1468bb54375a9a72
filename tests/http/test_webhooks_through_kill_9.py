"""What a hook was answered a 200 for is in the room, once and in order, through kill -9."""

import itertools
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.http.conftest import BOT_TOKEN, KEY, TLS, Bridge
from tests.http.hooked import HOOKS, PATH
from tests.patience import PATIENCE
from tests.processes import serving
from tests.upstream import Rooms, Upstream

KILLS = 5
SENDERS = 6


def test_what_was_answered_200_survives_kill_9(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    """A sender that hears nothing, or a 503, sends the same again, as Alertmanager does."""
    (tmp_path / "hooks.yaml").write_text(json.dumps(HOOKS))
    settings = {"BASE_URL": upstream.url, "ACCESS_TOKEN": BOT_TOKEN, "FLOWBRIDGE_API_KEYS": KEY}
    ends, address = threading.Event(), [""]
    sent: list[list[int]] = [[] for _ in range(SENDERS)]

    def send(sender: int) -> None:
        with httpx.Client(trust_env=False, verify=TLS, timeout=5.0) as client:
            for number in itertools.count():
                tell(client, sender, number)
                if ends.is_set():
                    return

    def tell(client: httpx.Client, sender: int, number: int) -> None:
        headers = {"Idempotency-Key": f"{sender}-{number}"} if sender % 2 else {}
        deadline = time.monotonic() + 4 * PATIENCE
        while time.monotonic() < deadline:
            try:
                answer = client.post(address[0] + PATH, json={"text": f"{sender}-{number}"}, headers=headers)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                sent[sender].append(number)
                return
        raise AssertionError("no answer")

    chance = random.Random(15)  # noqa: S311 (no secret)
    log = tmp_path / "log"

    def running() -> Any:
        return serving(cwd=tmp_path, log=log, FLOWBRIDGE_HOOKS_FILE=str(tmp_path / "hooks.yaml"), **settings)

    with ThreadPoolExecutor(SENDERS) as threads:
        sending: list[Any] = []
        for _ in range(KILLS):
            with running() as (url, process):
                address[0] = url
                sending = sending or [threads.submit(send, sender) for sender in range(SENDERS)]
                rooms.wait_for(len(rooms.events) + 20)
                time.sleep(chance.uniform(0.0, 0.2))
                process.kill()
                process.wait(PATIENCE)
        with running() as (url, process):
            address[0] = url
            ends.set()
            for done in sending:
                done.result(5 * PATIENCE)
            Bridge(url, upstream).wait_until_idle()
    assert "Traceback" not in log.read_text()
    bodies = [event.content["body"] for event in rooms.events]
    assert not [body for body, number in Counter(bodies).items() if number > 1]
    for sender in range(SENDERS):
        mine = [body for body in bodies if body.startswith(f"{sender}-")]
        assert mine == [f"{sender}-{number}" for number in sent[sender]]
