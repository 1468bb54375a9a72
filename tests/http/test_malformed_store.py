"""A database file that is malformed: told at the start, and while the bridge runs; nothing is accepted into it."""

from pathlib import Path

import httpx
import pytest

from flowbridge.store import Database, outbox
from tests.http.conftest import HELLO, KEY, SEND, running
from tests.integration.store.events import event
from tests.processes import run
from tests.upstream import Upstream

ROWS = 3_000  # of 1 kB: more than SQLite keeps in memory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with some events."""
    database = Database(f"sqlite:///{tmp_path}/flowbridge.db")
    database.open(shared=True, make=True)
    content = '{"body":"%s"}' % ("x" * 1_000)
    events = [event(f"e{n}", "a|!r:hs", content=content, state="sent", settled_at=10**13) for n in range(ROWS)]
    with database.engine.begin() as connection:
        outbox.insert_rows(connection, events)
    database.close()
    return tmp_path / "flowbridge.db"


def spoil(file: Path, where: str) -> None:
    size = file.stat().st_size
    start = {"all": 0, "behind the head": 4_096, "second half": size // 2}[where]
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(b"garbage!" * ((size - start) // 8))


@pytest.mark.parametrize("where", ["all", "behind the head", "second half"])
def test_serve_on_a_malformed_file_is_one_line_and_exit_code_2(file: Path, where: str) -> None:
    spoil(file, where)
    settings = {"BASE_URL": "http://127.0.0.1:1", "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{file}"}
    done = run("serve", "--port", "0", **settings)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("flowbridge: FLOWBRIDGE_DATABASE_URL: ")
    assert len(done.stderr.splitlines()) == 1
    assert "malformed" in done.stderr or "not a database" in done.stderr


@pytest.mark.parametrize("where", ["all", "behind the head"])
def test_file_that_is_malformed_under_a_running_bridge_is_said_and_takes_nothing_more(
    file: Path, upstream: Upstream, where: str
) -> None:
    with (
        running(upstream, file.parent) as bridge,
        httpx.Client(base_url=bridge.url, headers={"X-API-Key": KEY}, trust_env=False, timeout=30) as caller,
    ):
        assert caller.get("/readyz").status_code == 200
        spoil(file, where)
        if where != "all":  # only a reader of that part can tell
            answer = caller.get("/deliveries?event_type=none")
            assert (answer.status_code, answer.json()["errcode"]) == (503, "M_UNKNOWN")
        answer = caller.get("/readyz")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert answer.json()["flowbridge"]["failed"] == "store"
        assert "malformed" in answer.json()["error"]
        for headers in [dict[str, str](), {"Prefer": "respond-async"}, {"Idempotency-Key": "k"}]:
            refused = caller.post(SEND, json=HELLO, headers=headers)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert "malformed" in refused.json()["error"]
        assert caller.get("/metrics").status_code == 200
        assert caller.get("/healthz").status_code == 200
    assert upstream.events == []
