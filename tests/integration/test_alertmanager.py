"""A real Alertmanager tells a hook, and an HA pair does: one story, one message, through kill -9 of the bridge."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.alertmanager import Alertmanagers, alertmanagers
from tests.integration.conftest import KEY, Room
from tests.patience import PATIENCE, until
from tests.processes import free_port, serving_at

SECRET = "fh_the-secret-that-Alertmanager-has-of-the-hook"
PINGED = "@oncall:example.org"


class Bridge:
    """A process on one port, which can be killed and is started again on what it left."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.port = free_port()
        self.kills = 0
        self.failed: list[BaseException] = []
        self._folder, self._settings = folder, settings
        self._ends = threading.Event()

    @property
    def hook(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/alerts"

    def check(self) -> None:
        """What there is to wait for comes from a bridge: it must be there, or on its way."""
        if self.failed:
            raise AssertionError(f"there is no bridge any more; the last one said:\n{self.said()}") from self.failed[0]

    def said(self) -> str:
        """The last lines of the last bridge, and of each Alertmanager."""
        logs = [self._folder / f"log-{self.kills}", *sorted(self._folder.glob("alertmanager-*.log"))]
        lines = (log.read_text(errors="replace").splitlines()[-10:] for log in logs if log.exists())
        return "\n\n".join("\n".join(each) for each in lines)

    def serve(self, killed: bool) -> None:
        try:
            self._serve(killed)
        except BaseException as error:
            self.failed.append(error)

    def _serve(self, killed: bool) -> None:
        chance = random.Random(15)  # noqa: S311 (no secret)
        while not self._ends.is_set():
            log = self._folder / f"log-{self.kills}"
            with serving_at(self.port, self._settings, log=log, cwd=self._folder) as (_, process):
                assert process.poll() is None, "another process answers on this port"
                deadline = time.monotonic() + 2 * PATIENCE  # each member tells it again within some seconds
                while killed and not self._ends.is_set() and "/hooks/alerts" not in log.read_text():
                    assert process.poll() is None, "the bridge has ended by itself"
                    assert time.monotonic() < deadline, "the bridge has answered no Alertmanager"
                    time.sleep(0.01)  # a start may take longer than Alertmanager waits between two tries
                self._ends.wait(chance.uniform(0.0, 0.5) if killed else None)
                if not self._ends.is_set():
                    process.kill()
                    self.kills += 1
            assert "Traceback" not in log.read_text()

    def end(self) -> None:
        self._ends.set()


@contextmanager
def bridge(synapse: LocalSynapse, owner: Account, room: Room, folder: Path, killed: bool) -> Iterator[Bridge]:
    hook = {"name": "alerts", "room": room.id, "source": "alertmanager", "mention": [PINGED]}
    (folder / "hooks.yaml").write_text(json.dumps([{**hook, "verification": {"secret": SECRET}}]))
    settings = {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": owner.access_token,
        "FLOWBRIDGE_API_KEYS": KEY,
        "FLOWBRIDGE_HOOKS_FILE": str(folder / "hooks.yaml"),
        "FLOWBRIDGE_ALLOW_HTTP": "1",
    }
    found = Bridge(folder, settings)
    serving = threading.Thread(target=found.serve, args=(killed,))
    serving.start()
    try:
        yield found
    finally:
        found.end()
        serving.join()
    found.check()
    assert not killed or found.kills


def shown(room: Room) -> list[tuple[str, bool]]:
    """The messages of the room as clients show them, and whether each pinged; nothing in it may be there twice."""
    found: dict[str, tuple[str, bool]] = {}
    for event in room.messages():
        content: dict[str, Any] = event["content"]
        relation = content.get("m.relates_to", {})
        if relation.get("rel_type") == "m.replace":
            assert not content["m.mentions"]
            assert relation["event_id"] == list(found)[-1], "an edit of another message than the newest"
            new = content["m.new_content"]["body"]
            assert found[relation["event_id"]][0] != new, "an edit that says nothing new"
            found[relation["event_id"]] = new, found[relation["event_id"]][1]
        else:
            assert content["msgtype"] == "m.text"
            found[event["event_id"]] = content["body"], content["m.mentions"] == {"user_ids": [PINGED]}
    return list(found.values())


def shows(served: Bridge, senders: Alertmanagers, room: Room, *expected: tuple[str, ...]) -> None:
    """Wait until there are so many messages, each of which says this."""

    def is_so() -> bool:
        served.check()
        senders.check()
        found = shown(room)
        assert len(found) <= len(expected), found
        return len(found) == len(expected) and all(
            all(part in body for part in parts) for (body, _), parts in zip(found, expected, strict=True)
        )

    until(is_so, 5 * PATIENCE, else_=lambda: f"{shown(room)}\n{served.said()}")


@pytest.mark.timeout(900)  # many starts of the bridge, on a machine that may be busy
@pytest.mark.parametrize(
    ("members", "gossips", "killed"),
    [(1, False, False), (2, True, False), (1, False, True), (2, False, True)],
    ids=["one", "pair", "one, bridge killed", "parted pair, bridge killed"],
)
def test_alerts_are_told_in_one_message_for_each_beginning(
    synapse: LocalSynapse,
    owner: Account,
    new_room: Callable[..., Room],
    tmp_path: Path,
    members: int,
    gossips: bool,
    killed: bool,
) -> None:
    room = new_room()
    with (
        bridge(synapse, owner, room, tmp_path, killed) as served,
        alertmanagers(members, served.hook, SECRET, tmp_path, gossips=gossips) as senders,
    ):
        tell_a_story(served, senders, room)
    assert [pinged for _, pinged in shown(room)] == [True, True, True]


def tell_a_story(served: Bridge, senders: Alertmanagers, room: Room) -> None:
    """Each step is repeated before the next."""
    senders.fires("web-1", "web-2")
    shows(served, senders, room, ("firing 2", "web-1", "web-2"))
    senders.repeat()
    senders.fires("web-3")
    shows(served, senders, room, ("firing 2",), ("firing 3", "web-3"))
    senders.repeat()
    senders.resolves("web-1")
    shows(served, senders, room, ("firing 2",), ("firing 2, resolved 1",))
    senders.repeat()
    senders.resolves("web-2", "web-3")
    shows(served, senders, room, ("firing 2",), ("resolved",))
    senders.fires("web-1")
    shows(served, senders, room, ("firing 2",), ("resolved",), ("firing", "web-1"))
    senders.repeat()
    shows(served, senders, room, ("firing 2",), ("resolved",), ("firing", "web-1"))
