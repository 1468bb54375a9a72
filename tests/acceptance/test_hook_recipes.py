"""docs/hooks.md: each recipe from its own text, with the sender itself where it can run here, and a homeserver.

FLOWBRIDGE_SCREENSHOTS=1 also makes the page's pictures again, of the events that the homeserver then has.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.sources import BY_NAME
from tests import node, transcripts, view
from tests.acceptance.test_recipes import CLIENTS, PROGRAMS, cook, fields
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import Room
from tests.patience import PATIENCE, until
from tests.processes import REPOSITORY, free_port, run, serving_at
from tests.transcripts import blocks

PAGE = (REPOSITORY / "docs" / "hooks.md").read_text()
PAYLOADS = REPOSITORY / "tests" / "payloads"


@dataclass(frozen=True)
class Desk:
    """A bridge, and the room to which its hooks report."""

    bridge: str
    settings: dict[str, str]
    folder: Path
    room: Room
    bot: Account

    def recipe(self, title: str) -> str:
        """A section of the page, for this room, after its hook has been made as it says."""
        (found,) = re.findall(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
        names = {"bridge.example.org:8090": self.bridge.removeprefix("http://"), "'!ops:example.org'": self.room.id}
        section = transcripts.replaced(found, names)
        (make,) = [step for step in transcripts.steps(section) if step.command.startswith("flowbridge hooks create")]
        made = run(*make.command.split()[1:], **self.settings)
        assert made.returncode == 0, made.stderr
        (url,) = re.findall(r"^https?://\S+$", made.stdout, re.MULTILINE)
        # A running bridge looks for hooks that it does not know once a second: this makes it look now.
        key = (self.folder / "flowbridge.db.first-key").read_text().strip()
        hook = f"{self.bridge}/hooks/{url.partition('/hooks/')[2].partition('/')[0]}"
        httpx.get(hook, headers={"X-API-Key": key}, trust_env=False).raise_for_status()
        secret = re.search(r"Its secret is (\S+)", made.stdout + made.stderr)  # one that signs is no part of the URL
        return section.replace("fh_your-secret", secret[1] if secret else url.rpartition("/")[2])

    def wait_for(self, number: int, since: int) -> list[dict[str, Any]]:
        """The events in the room, once there are as many new ones."""
        until(lambda: len(self.room.messages()) >= since + number, else_=self.room.bodies)
        return self.room.messages()[since:]

    def picture(self, name: str, events: list[dict[str, Any]], *shown: int) -> None:
        """What the page shows: these of the events. Made, and put where it is shown, only if it is wanted."""
        ids = [events[number]["event_id"] for number in shown]
        html = view.page(events, {self.bot.user_id: "flowbot"}, ids, lambda _: b"")
        assert html.count('<div class="event') == len(ids)
        if os.environ.get("FLOWBRIDGE_SCREENSHOTS") == "1":
            view.picture(html, REPOSITORY / "docs" / "pictures" / f"{name}.png", self.folder)


@pytest.fixture(scope="module")
def desk(
    synapse: LocalSynapse, make_account: MakeAccount, make_room: MakeRoom, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    folder, bot = tmp_path_factory.mktemp("desk"), make_account()
    settings = {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{folder}/flowbridge.db",
    }
    room = make_room(bot)
    with serving_at(free_port(), settings) as (url, _), httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        yield Desk(url, settings, folder, Room(room, bot, direct), bot)


@contextmanager
def alertmanager(configuration: str, folder: Path) -> Iterator[str]:
    """Debian's, which waits for no further alerts."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program is None:
        node.missing("There is no Alertmanager here, so that it is NOT TESTED: apt install prometheus-alertmanager")
    assert program is not None
    parsed = yaml.safe_load(configuration)
    parsed["route"] |= {"group_wait": "10ms", "group_interval": "10ms"}
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(parsed))
    url = f"http://127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={url.removeprefix('http://')}", "--cluster.listen-address="],
            stderr=log,
            stdout=log,
        )
    try:
        until(lambda: _answers(f"{url}/-/ready"), else_=(folder / "log").read_text)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_alertmanager_reports_alerts_and_their_end(desk: Desk, tmp_path: Path) -> None:
    before = len(desk.room.messages())
    (configuration,) = blocks(desk.recipe("Alertmanager"), "yaml")
    alerts = [
        {
            "labels": {"alertname": "HostDown", "instance": f"web-{number}:9100", "severity": "critical"},
            "annotations": {
                "summary": f"web-{number} does not answer",
                "runbook_url": "https://runbooks.example.org/HostDown",
            },
            "startsAt": (datetime.now(UTC) - timedelta(minutes=5)).isoformat(),
        }
        for number in (1, 2)
    ]
    with alertmanager(configuration, tmp_path) as url:
        httpx.post(f"{url}/api/v2/alerts", json=alerts, trust_env=False).raise_for_status()
        (first,) = desk.wait_for(1, before)
        ended = [{**alerts[0], "endsAt": datetime.now(UTC).isoformat()}]
        httpx.post(f"{url}/api/v2/alerts", json=ended, trust_env=False).raise_for_status()
        _, edit, *_ = desk.wait_for(2, before)
    assert first["content"]["msgtype"] == "m.text"
    assert first["content"]["body"].startswith("🔥 HostDown: firing 2\n\nseverity: critical\n\n- web-1 does not answer")
    assert edit["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": first["event_id"]}
    assert edit["content"]["m.new_content"]["body"].startswith("🔥 HostDown: firing 1, resolved 1\n")
    again = {**first, "event_id": "$before"}
    desk.picture("hook-alertmanager", [again, first, edit], 0, 1)


def test_grafana_reports_alerts(desk: Desk) -> None:
    """Without Grafana itself: by what the file sets, and a body that it sent."""
    before = len(desk.room.messages())
    recipe = desk.recipe("Grafana")
    (file,) = blocks(recipe, "yaml")
    (point,) = yaml.safe_load(file)["contactPoints"]
    (receiver,) = point["receivers"]
    settings = receiver["settings"]
    assert list(fields(recipe).values()) == [
        settings["url"],
        settings["httpMethod"],
        settings["authorization_scheme"],
        settings["authorization_credentials"],
    ]
    token = f"{settings['authorization_scheme']} {settings['authorization_credentials']}"
    bodies = [BY_NAME["grafana"].sample, json.loads((PAYLOADS / "grafana/test-notification-9.json").read_text())]
    for body in bodies:
        headers = {"Authorization": token, "User-Agent": "Grafana"}
        answer = httpx.request(settings["httpMethod"], settings["url"], json=body, headers=headers, trust_env=False)
        assert answer.status_code == 200, answer.text
    first, test = desk.wait_for(2, before)
    assert first["content"]["body"].startswith("🔥 High load: firing\n\nThe load of web-1 is above 10\n")
    assert test["content"]["body"].startswith("🔥 TestAlert: firing\n\nNotification test\n")
    desk.picture("hook-grafana", [first], 0)


@pytest.mark.timeout(node.INSTALL_SECONDS + 300)
@pytest.mark.parametrize("body", ["Preset - application/json", "Preset - multipart/form-data"])
def test_uptime_kuma_reports_down_and_up(desk: Desk, body: str) -> None:
    """With the code that npm has, of 2023."""
    folder = CLIENTS / "uptime-kuma"
    node.installed(folder, "Uptime Kuma")
    before = len(desk.room.messages())
    entered = fields(recipe_once(desk, "Uptime Kuma"))
    assert entered["Request Body"] == "Preset - application/json"
    monitor: dict[str, Any] = {
        **BY_NAME["uptime-kuma"].sample["monitor"],
        "id": len(body),  # a monitor of its own
        "basic_auth_pass": "canary",
        "headers": '{"Authorization": "canary"}',
    }

    def notify(said: str, heartbeat: dict[str, Any] | None = None) -> None:
        order = {"type": "Webhook", "fields": {**entered, "Request Body": body}, "text": said}
        more = {"monitor": monitor, "heartbeat": heartbeat} if heartbeat else {}
        assert "Sent Successfully" in cook([f"{PROGRAMS}/node", "run.cjs"], folder, {**order, **more})

    notify(f"My Matrix Testing {body}")
    down = {"monitorID": 7, "status": 0, "time": "2026-11-30 14:06:38.123", "msg": "connect ECONNREFUSED 192.0.2.7:443"}
    notify("[Shop] [🔴 Down] connect ECONNREFUSED", down)
    notify(
        "[Shop] [✅ Up] 200 - OK", {**down, "status": 1, "time": "2026-11-30 14:10:38", "msg": "200 - OK", "ping": 21}
    )
    test, first, edit = desk.wait_for(3, before)
    assert test["content"]["body"] == f"Uptime Kuma\n\nMy Matrix Testing {body}"
    assert first["content"]["body"].startswith("🔥 Shop: down\n\nconnect ECONNREFUSED 192.0.2.7:443\n")
    assert edit["content"]["m.relates_to"] == {"rel_type": "m.replace", "event_id": first["event_id"]}
    assert edit["content"]["m.new_content"]["body"].startswith("✅ Shop: up\n\n200 - OK\n")
    assert "canary" not in json.dumps([test, first, edit])
    desk.picture("hook-kuma", [{**first, "event_id": "$before"}, first, edit], 0, 1)


_RECIPES: dict[str, str] = {}


def recipe_once(desk: Desk, title: str) -> str:
    """A recipe whose hook several tests use."""
    if title not in _RECIPES:
        _RECIPES[title] = desk.recipe(title)
    return _RECIPES[title]


def test_pictures_of_the_page_are_made_here() -> None:
    here = Path(__file__).read_text()
    shown = set(re.findall(r"\(pictures/(hook-[a-z-]+)\.png\)", PAGE))
    assert {"hook-alertmanager", "hook-grafana", "hook-kuma"} <= shown
    assert set(re.findall(r'\.picture\("(hook-[a-z]+)"', here)) <= shown
