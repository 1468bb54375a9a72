"""A message of several events is accepted as a whole: kill -9 loses nothing of it, and repeats nothing."""

import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests import upstream as scripted
from tests.http.conftest import ROOM, TLS, as_caller
from tests.http.test_waiting import serving_in
from tests.patience import PATIENCE
from tests.upstream import Rooms, Upstream

MESSAGES = f"/rooms/{ROOM}/messages"
KILLS = 5
WRITERS = 6


def message(writer: int, number: int) -> dict[str, Any]:
    """Three events; each writer's messages update its first one."""
    name = f"{writer}-{number}"
    files = [{"content_uri": "mxc://hs/x", "filename": f"{name}-{part}"} for part in ("a", "b")]
    return {"markdown": f"*{name}*", "attachments": files, "key": f"writer {writer}", "on_update": "reply"}


def test_messages_of_several_events_survive_kill_9(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    upstream.script(rooms)
    ends, address = threading.Event(), [""]
    sent: list[list[int]] = [[] for _ in range(WRITERS)]

    def write(writer: int) -> None:
        with httpx.Client(trust_env=False, verify=TLS, timeout=5.0) as client:
            for number in itertools.count():
                say(client, writer, number)
                if ends.is_set():
                    return

    def say(client: httpx.Client, writer: int, number: int) -> None:
        """Until there is an answer."""
        headers = {"Authorization": "Bearer writer", "Idempotency-Key": f"{writer}-{number}"}
        deadline = time.monotonic() + 4 * PATIENCE
        while time.monotonic() < deadline:
            try:
                answer = client.post(address[0] + MESSAGES, json=message(writer, number), headers=headers)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            assert answer.status_code in (200, 202, 503), answer.text
            if answer.status_code != 503:
                sent[writer].append(number)
                return
        raise AssertionError("no answer")

    chance = random.Random(14)  # noqa: S311 (no secret)
    with ThreadPoolExecutor(WRITERS) as threads:
        writing: list[Any] = []
        for _ in range(KILLS):
            with serving_in(tmp_path, upstream) as (bridge, process):
                address[0] = bridge.url
                writing = writing or [threads.submit(write, writer) for writer in range(WRITERS)]
                rooms.wait_for(len(rooms.events) + 30)
                time.sleep(chance.uniform(0.0, 0.2))
                process.kill()
                process.wait(PATIENCE)
        with serving_in(tmp_path, upstream) as (bridge, process):
            address[0] = bridge.url
            ends.set()
            for done in writing:
                done.result(5 * PATIENCE)
            bridge.wait_until_idle()
    bodies = [event.content["body"].strip("*") for event in rooms.events]
    assert not [body for body, number in Counter(bodies).items() if number > 1]
    for writer in range(WRITERS):
        mine = [body for body in bodies if body.startswith(f"{writer}-")]
        assert mine == [f"{writer}-{number}{part}" for number in sent[writer] for part in ("", "-a", "-b")]
    at = {body: index for index, body in enumerate(bodies)}
    for body, index in at.items():
        if body.count("-") == 1:  # nothing of another message gets between the events of one
            assert bodies[index : index + 3] == [body, f"{body}-a", f"{body}-b"]
    for writer in range(WRITERS):
        first, *others = [event for event in rooms.events if event.content["body"].startswith(f"*{writer}-")]
        assert "m.relates_to" not in first.content
        for event in others:  # the key was remembered through each kill, and the message that it stands for was found
            assert event.content["m.relates_to"] == {"m.in_reply_to": {"event_id": first.event_id}}


def test_late_target_is_found_after_kill_9(upstream: Upstream, rooms: Rooms, tmp_path: Path) -> None:
    upstream.script(lambda request: scripted.hang_up if request.method == "PUT" else None)
    with serving_in(tmp_path, upstream) as (bridge, process), as_caller(bridge, "writer") as caller:
        queued = caller.post(MESSAGES, json={"text": "first"}, headers={"Prefer": "respond-async"}).json()
        edit = {"text": "second", "edit": queued["delivery_id"]}
        assert caller.post(MESSAGES, json=edit, headers={"Prefer": "respond-async"}).status_code == 202
        process.kill()
        process.wait(PATIENCE)
    upstream.drop()
    upstream.script(rooms)
    with serving_in(tmp_path, upstream):
        rooms.wait_for(2)
    assert rooms.bodies == ["first", "* second"]
    assert rooms.events[1].content["m.relates_to"] == {"rel_type": "m.replace", "event_id": rooms.events[0].event_id}
