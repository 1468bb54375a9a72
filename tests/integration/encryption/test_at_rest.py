"""What is for encrypted rooms is in clear on no disk: both engines, the homeserver and all logs are searched."""

import secrets
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import create_engine, text

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.store.engine import parse
from flowbridge.store.tables import metadata
from tests.conftest import MakeRoom, NewDatabase
from tests.integration.conftest import KEY
from tests.patience import PATIENCE, until
from tests.processes import free_port, run, serving_at

MEGOLM = {"algorithm": "m.megolm.v1.aes-sha2"}
Json = dict[str, Any]


@dataclass
class Kept:
    """A bridge that is started again and again, and all that it and its homeserver leave on disks."""

    synapse: LocalSynapse
    folder: Path
    settings: dict[str, str]
    make_room: MakeRoom
    bot: Account
    port: int = field(default_factory=free_port)
    starts: int = 0
    url: str = ""

    def serving(self, **settings: str) -> Any:
        self.starts += 1
        log = self.folder / f"log-{self.starts}.txt"
        self.url = f"http://127.0.0.1:{self.port}"
        return serving_at(self.port, {**self.settings, **settings}, log=log, cwd=self.folder)

    def room(self, algorithm: str | None = MEGOLM["algorithm"]) -> str:
        state = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": algorithm}}
        return self.make_room(self.bot, preset="public_chat", initial_state=[state] if algorithm else [])

    def call(self, method: str, path: str, **given: Any) -> httpx.Response:
        headers = {"X-API-Key": KEY, **given.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=PATIENCE, trust_env=False, **given)

    def send(self, room: str, body: str, **headers: str) -> httpx.Response:
        content = {"msgtype": "m.text", "body": body}
        return self.call("POST", f"/rooms/{quote(room)}/send/m.room.message", json=content, headers=headers)

    @staticmethod
    def delivery(answer: httpx.Response) -> str:
        return answer.headers["flowbridge-delivery"]

    def shown(self, delivery: str) -> Json:
        found: Json = self.call("GET", f"/deliveries/{delivery}").raise_for_status().json()
        return found

    def ends(self, delivery: str, status: str) -> Json:
        until(lambda: self.shown(delivery)["status"] == status, 2 * PATIENCE, else_=lambda: self.shown(delivery))
        return self.shown(delivery)

    def found(self, query: str) -> list[str]:
        page = self.call("GET", f"/deliveries?q={query}").raise_for_status().json()
        return [each["delivery_id"] for each in page["deliveries"]]

    def in_clear(self, secret: str) -> list[str]:
        """Where this stands: files of the bridge and the homeserver, and PostgreSQL's tables."""
        needle = secret.encode()
        folders = (self.folder, Path(self.synapse._temporary.name))
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert any(path.name.startswith("homeserver.db") for path in files)
        where = [path.name for path in files if needle in path.read_bytes()]
        url = parse(self.settings["FLOWBRIDGE_DATABASE_URL"])
        if url.drivername == "sqlite":
            assert Path(str(url.database)) in files
            return where
        engine = create_engine(url)
        with engine.begin() as connection:
            for table in metadata.tables:
                rows = connection.scalars(text(f"SELECT t::text FROM {table} t"))  # noqa: S608 (our own names)
                where += [table for row in rows if secret in row]
        engine.dispose()
        return where


@pytest.fixture
def kept(
    synapse: LocalSynapse, bot: Account, make_room: MakeRoom, new_database: NewDatabase, secret: str, tmp_path: Path
) -> Kept:
    settings = {
        "BASE_URL": synapse.url,
        "ACCESS_TOKEN": bot.access_token,
        "FLOWBRIDGE_API_KEYS": KEY,
        "FLOWBRIDGE_DATABASE_URL": new_database(),
        "FLOWBRIDGE_SECRET_KEY": secret,
        "FLOWBRIDGE_ENCRYPTED_ROOMS": "encrypt",
        "FLOWBRIDGE_LOG_LEVEL": "debug",
        "FLOWBRIDGE_REQUEST_SECONDS": "5",
        "FLOWBRIDGE_LEASE_SECONDS": "11",
    }
    return Kept(synapse, tmp_path, settings, make_room, bot)


def word() -> str:
    """Found by no chance."""
    return f"zz{secrets.token_hex(8)}"


def test_content_for_an_encrypted_room_is_in_clear_on_no_disk(kept: Kept) -> None:
    said = word()
    room, unknown = kept.room(), kept.room("org.example.unknown")
    with kept.serving() as (_, process):
        sent = kept.send(room, f"{said} sent", **{"Idempotency-Key": "one"})
        assert sent.status_code == 200, sent.text
        flow = {"payload": f"{said} flow", "topic": said}  # kept as it came, beside its content
        assert kept.call("POST", f"/rooms/{quote(room)}/send/m.room.message", json=flow).status_code == 200
        path = f"/_matrix/client/v3/rooms/{quote(room)}/send/m.room.message/t1"
        assert kept.call("PUT", path, json={"msgtype": "m.text", "body": f"{said} txn"}).status_code == 200
        path = f"/rooms/{quote(room)}/messages"
        for _ in range(2):
            message = {"markdown": f"**{said}**", "key": "story", "title": said}
            assert kept.call("POST", path, json=message).status_code == 200
        where = {"msgtype": "m.location", "body": "here", "geo_uri": said}
        assert kept.call("POST", f"/rooms/{quote(room)}/send/m.room.message", json=where).status_code == 400
        assert said in kept.call("GET", "/deliveries?state=refused").text, "its caller is told what is wrong"
        dead = kept.send(unknown, f"{said} dead")
        assert (dead.status_code, kept.ends(kept.delivery(dead), "dead")["status"]) == (403, "dead")
        queued = [kept.send(room, f"{said} {number}", Prefer="respond-async") for number in range(40)]
        process.kill()
    assert kept.in_clear(said) == []
    with kept.serving():
        for answer in queued:
            kept.ends(kept.delivery(answer), "sent")
        assert kept.shown(kept.delivery(sent))["event"]["content"]["body"] == f"{said} sent"
        assert kept.shown(kept.delivery(dead))["event"]["content"]["body"] == f"{said} dead"
        assert set(map(kept.delivery, (sent, dead, *queued))) <= set(kept.found(said))
        assert kept.send(room, f"{said} sent", **{"Idempotency-Key": "one"}).json() == sent.json()
        assert kept.send(room, "other", **{"Idempotency-Key": "one"}).status_code == 422
        replayed = kept.call("POST", f"/deliveries/{kept.delivery(sent)}/replay")
        assert replayed.status_code in (200, 202), replayed.text
        again = kept.ends(kept.delivery(sent), "sent")
        assert again["event_id"] != sent.json()["event_id"]
        assert kept.in_clear(said) == []
    shown = run("deliveries", "show", kept.delivery(sent), **kept.settings)
    assert f"{said} sent" in shown.stdout
    without = run("deliveries", "show", kept.delivery(sent), **{**kept.settings, "FLOWBRIDGE_SECRET_KEY": ""})
    assert said not in without.stdout
    assert "sent" in without.stdout


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_what_went_out_encrypted_is_not_kept_where_contents_of_plain_rooms_alone_are(kept: Kept) -> None:
    said = word()
    with kept.serving(FLOWBRIDGE_KEEP_CONTENTS="plain"):
        sent, dead = kept.send(kept.room(), said), kept.send(kept.room("org.example.unknown"), said)
        plain = kept.send(kept.room(None), said)
        assert [sent.status_code, dead.status_code, plain.status_code] == [200, 403, 200]
        assert "event" not in kept.shown(kept.delivery(sent))
        assert kept.shown(kept.delivery(plain))["event"]["content"]["body"] == said
        assert kept.shown(kept.delivery(dead))["event"]["content"]["body"] == said, "it may be sent again"
        assert set(kept.found(said)) == {kept.delivery(plain), kept.delivery(dead)}
        replayed = kept.call("POST", f"/deliveries/{kept.delivery(sent)}/replay")
        assert replayed.status_code == 409
        assert "FLOWBRIDGE_KEEP_CONTENTS=plain" in replayed.json()["error"]
    name = parse(kept.settings["FLOWBRIDGE_DATABASE_URL"]).database
    with sqlite3.connect(str(name)) as connection:
        contents = dict(connection.execute("SELECT delivery, content FROM outbox"))
    assert contents[kept.delivery(sent)] == ""
