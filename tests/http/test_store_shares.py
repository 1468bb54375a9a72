"""One user cannot stop the bridge for everybody (security design, "noisy neighbour")."""

import json
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import select, update

from flowbridge.delivery import worker
from flowbridge.models.timing import Timing
from flowbridge.store import Database, tables
from tests import upstream as scripted
from tests.http.conftest import KEY, SEND, Bridge, as_caller, running
from tests.http.sends import ASYNC, MATRIX, text
from tests.patience import until
from tests.processes import run
from tests.upstream import PATIENCE, Behaviour, Request, Rooms, Upstream

pytestmark = pytest.mark.usefixtures("way")

DAY = 86_400_000
LARGE = {"msgtype": "m.text", "body": "x" * 60_000}
DATABASE_BYTES = 8 * 1024 * 1024
OPERATOR = {"X-API-Key": KEY}


QUICK = Timing(count_seconds=0.1, purge_seconds=0.1, give_up_seconds=0.1)


@pytest.fixture
def rooms(upstream: Upstream) -> Rooms:
    """Rooms whose name begins with `nowhere` have no members; a send to `slow` is never answered."""
    found = Rooms()

    def script(request: Request) -> Behaviour | None:
        if "nowhere" in request.target:
            return scripted.matrix_error(403, "M_FORBIDDEN", "You are not in the room")
        return scripted.silence if "slow" in request.target else found(request)

    upstream.script(script)
    return found


class Store:
    """The bridge's database from outside."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._database.open(shared=True, make=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.engine.dispose()

    def states(self, user_id: str = "") -> list[str]:
        with self._database.engine.connect().execution_options(reads=True) as connection:
            theirs = select(tables.accounts.c.account).where(tables.accounts.c.user_id == user_id)
            query = select(tables.outbox.c.state)
            return list(connection.scalars(query.where(tables.outbox.c.account.in_(theirs)) if user_id else query))

    def errors(self) -> set[str]:
        with self._database.engine.connect().execution_options(reads=True) as connection:
            found = connection.scalars(select(tables.outbox.c.error).where(tables.outbox.c.state == "dead"))
            return {json.loads(error)["error"] for error in found if error}

    def age(self, **ms: int) -> None:
        """As if all that is queued, or was settled, had been so for this much longer."""
        with self._database.engine.begin() as connection:
            for name, by in ms.items():
                column = tables.outbox.c[name]
                connection.execute(update(tables.outbox).where(column.is_not(None)).values({name: column - by}))


def check_sent(answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text


def check_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["errcode"] == "M_LIMIT_EXCEEDED"
    assert "of this API key or account are queued already, which is its share" in answer.json()["error"]


def fill(hog: httpx.Client, watch: Callable[[], None]) -> int:
    """Large events for rooms without members, until one is refused; how many were accepted."""
    taken, deadline = 0, time.monotonic() + 6 * PATIENCE
    while time.monotonic() < deadline:
        answer = hog.post(f"/rooms/!nowhere{taken}:upstream/send/m.room.message", json=LARGE, headers=ASYNC)
        if answer.status_code != 202:
            check_refused(answer)
            return taken
        taken += 1
        if taken % 20 == 0:
            watch()
    raise AssertionError(f"{taken} of them were taken, and no end")


def settings(url: str, **values: Any) -> dict[str, Any]:
    secret = SecretStr(Fernet.generate_key().decode())
    return {"database_url": SecretStr(url), "secret_key": secret, "max_database_bytes": DATABASE_BYTES, **values}


def test_user_who_floods_the_store_gets_a_share_of_it_and_others_notice_nothing(
    upstream: Upstream, rooms: Rooms, tmp_path: Any, empty_url: str
) -> None:
    with running(upstream, tmp_path, timing=QUICK, **settings(empty_url)) as bridge:
        hog, quiet = as_caller(bridge, "the-hog"), as_caller(bridge, "quiet")
        bot = httpx.Client(base_url=bridge.url, headers=OPERATOR, trust_env=False, timeout=PATIENCE)
        with hog, quiet, bot, Store(empty_url) as store:
            watched: list[str] = []

            def watch() -> None:
                for caller in (quiet, bot):
                    watched.append(f"quiet-{len(watched)}")
                    check_sent(caller.post(SEND, json=text(watched[-1])))
                watched.append(f"quiet-{len(watched)}")
                assert quiet.post(SEND, json=text(watched[-1]), headers=ASYNC).status_code == 202

            taken = fill(hog, watch)
            assert 30 < taken < 0.5 * DATABASE_BYTES / 60_000
            watch()
            until(lambda: store.states(scripted.user_of("the-hog")).count("queued") == taken, 3 * PATIENCE)
            check_refused(hog.post(SEND, json=text("small"), headers=ASYNC))  # whatever it is, for a second
            check_refused(hog.post(f"{MATRIX}{SEND}", json=LARGE))
            # There is still room for that.
            until(lambda: hog.post(SEND, json=text("small")).status_code == 200, 3 * PATIENCE)
            watch()

            until(lambda: store.states().count("queued") == taken, 3 * PATIENCE)
            store.age(accepted_at=8 * DAY)
            until(lambda: "queued" not in store.states(), 3 * PATIENCE)
            watch()
            assert store.states(scripted.user_of("the-hog")).count("dead") == taken
            assert all(error.startswith("it was not delivered within 7 days: @") for error in store.errors())
            # The bridge counts them as such a moment after the store has them so.
            until(lambda: hog.post(SEND, json=text("again")).status_code == 200, 3 * PATIENCE)
            store.age(settled_at=31 * DAY)
            until(lambda: "dead" not in store.states(), 3 * PATIENCE)
            watch()
        until(lambda: {body for body in rooms.bodies if body.startswith("quiet")} == set(watched), 3 * PATIENCE)
        assert len(rooms.bodies) == len(set(rooms.bodies))


def test_operator_removes_what_one_user_has_queued_beside_the_running_bridge(
    upstream: Upstream, rooms: Rooms, tmp_path: Any, empty_url: str
) -> None:
    """What waits in a room that is slow, too: the bridge has it in memory, and lets go of it."""
    with running(
        upstream, tmp_path, timing=QUICK, **settings(empty_url, request_seconds=1.0, lease_seconds=7.0)
    ) as bridge:
        hog, quiet = as_caller(bridge, "the-hog"), as_caller(bridge, "quiet")
        with hog, quiet, Store(empty_url) as store:
            for number in range(5):
                path = f"/rooms/!nowhere{number}:upstream/send/m.room.message"
                for caller in (hog, quiet):
                    assert caller.post(path, json=text(f"{number}"), headers=ASYNC).status_code == 202
            for number in range(3):
                path = "/rooms/!slow:upstream/send/m.room.message"
                assert hog.post(path, json=text(f"{number}"), headers=ASYNC).status_code == 202
            user = scripted.user_of("the-hog")
            command = ["deliveries", "purge", "--queued", "--user", user, "--yes"]
            gone = 0
            for _ in range(20):  # the one that is on its way stays until its attempt is over
                done = run(*command, FLOWBRIDGE_DATABASE_URL=empty_url, FLOWBRIDGE_LEASE_SECONDS="7",
                           FLOWBRIDGE_REQUEST_SECONDS="1")  # fmt: skip
                gone += int(done.stdout.split()[0])
                if done.returncode == 0:
                    break
                assert "stay: a running bridge is sending them" in done.stderr
            assert gone == 8
            assert store.states(user) == []
            assert store.states(scripted.user_of("quiet")) == ["queued"] * 5
            # The bridge counts them as such a moment after the store has them so.
            until(lambda: hog.post(SEND, json=text("again")).status_code == 200, 3 * PATIENCE)
            assert len({one.target for one in upstream.events if "slow" in one.target}) <= 1


def test_dead_letters_of_a_flood_do_not_fill_the_store_either(upstream: Upstream, rooms: Rooms, tmp_path: Any) -> None:
    """60 kB events that are refused for good are kept for 30 days: the oldest of them go when space is short."""
    url = f"sqlite:///{tmp_path}/flowbridge.db"
    with running(upstream, tmp_path, timing=QUICK, **settings(url)) as bridge:
        hog, quiet = as_caller(bridge, "the-hog"), as_caller(bridge, "quiet")
        with hog, quiet:
            quiet.post("/rooms/!nowhere:upstream/send/m.room.message", json=text("a dead letter"))
            for number in range(220):
                path = f"/rooms/!nowhere{number}:upstream/send/m.room.message"
                while (answer := hog.post(path, json=LARGE)).status_code == 503:
                    check_sent(quiet.post(SEND, json=text("as ever")))
                    time.sleep(0.05)
                assert answer.status_code == 403, answer.text
                if number % 20 == 0:
                    check_sent(quiet.post(SEND, json=text("as ever")))
        with Store(url) as store:
            assert store.states(scripted.user_of("quiet")).count("dead") == 1
            assert 30 < store.states(scripted.user_of("the-hog")).count("dead") < 130


def test_caller_with_many_requests_that_wait_is_answered_202_at_once(
    bridge: Bridge, upstream: Upstream, rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits holds a connection, of which there are 4,096 for all."""
    monkeypatch.setattr(worker.Worker, "may_wait", lambda self, caller: False)
    with as_caller(bridge) as caller:
        answer = caller.post(SEND, json=text())
        assert answer.status_code == 202
        until(lambda: caller.get(answer.headers["location"]).json()["status"] == "sent", 3 * PATIENCE)
        refused = caller.post(f"{MATRIX}{SEND}", json=text())
        assert (refused.status_code, refused.json()["errcode"]) == (503, "M_LIMIT_EXCEEDED")
        assert refused.headers["retry-after"] == "1"
    assert len(rooms.bodies) == 1
