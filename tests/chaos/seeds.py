"""Bugs to sow: `python -m tests.chaos.seeds [SEED | MODULE.NAME=NUMBER]… serve --port P` breaks that and serves.

What a seed breaks is looked up by name: where the bridge was rewritten, it fails loudly instead of breaking nothing.
"""

import importlib
import random
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select, update

REPLICAS = {"seconds": 15.0, "every": 4.0, "patience": 25.0}
STOP = {"seconds": 32.0, "rooms": 24, "states": 12}
BACKLOG = {**REPLICAS, "lease": 6.0, "mode": "async", "rate": 300.0, "latency": 100.0}
# Nothing is asked before a send, so that one goes out as soon as a room is claimed.
PLAIN = {"FLOWBRIDGE_ENCRYPTED_ROOMS": "allow"}
SLOW = {**REPLICAS, "lease": 10.0, "mode": "async", "rate": 20.0, "latency": 2_500.0, "environment": PLAIN}
SQLITE = {"seconds": 8.0, "patience": 10.0}


@dataclass(frozen=True)
class Seed:
    """`scenario`: the one that shows it, with these options; `red`: what has to turn red, any of it."""

    sow: Callable[[], None]
    scenario: str
    red: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        return self.sow.__doc__ or ""


def early_202() -> None:
    """202 before the commit"""

    def append(original: Any, write_queue: Any, pending: Any, **named: Any) -> None:
        original(write_queue, pending, **named)
        if not pending.committed.done():
            pending.committed.set_result(None)

    _wrap("flowbridge.delivery.write_queue.WriteQueue.append", append)


def new_txn_id() -> None:
    """a new transaction id for each attempt"""

    def send(original: Any, homeserver: Any, token: str, event: Any, _: str) -> Any:
        return original(homeserver, token, event, secrets.token_hex(8))

    _wrap("flowbridge.homeserver.client.Homeserver.send", send)


def no_fence() -> None:
    """settle, release and renew ignore the fence"""
    from flowbridge.store import clock, leases
    from flowbridge.store.tables import lanes

    held: dict[str, int] = {}

    def claim(original: Any, *arguments: Any, **named: Any) -> Any:
        claims = original(*arguments, **named)
        held.update({claim.fence.lane: claim.fence.number for claim in claims})
        return claims

    def renew(_: Any, connection: Any, owner: str, lease_ms: int) -> dict[str, tuple[int, bool]]:
        mine = lanes.c.lane.in_(list(held))
        until = clock.lease_clock(connection) + lease_ms
        dirty = dict(connection.execute(select(lanes.c.lane, lanes.c.dirty).where(mine)).all())
        connection.execute(update(lanes).where(mine).values(owner=owner, lease_until=until, dirty=0))
        return {lane: (number, bool(dirty.get(lane))) for lane, number in held.items()}

    def settle(original: Any, connection: Any, settlements: Any) -> None:
        names = [one["b_lane"] for one in settlements]
        query = select(lanes.c.lane, lanes.c.owner, lanes.c.fence).where(lanes.c.lane.in_(names))
        now = {row.lane: {"b_owner": row.owner, "b_fence": row.fence} for row in connection.execute(query)}
        original(connection, [{**one, **now[one["b_lane"]]} for one in settlements])

    def release(_: Any, connection: Any, fences: Any, rest_ms: int = 0) -> None:
        for fence in fences:
            held.pop(fence.lane, None)
        given_back = update(lanes).where(lanes.c.lane.in_([fence.lane for fence in fences]))
        until = clock.lease_clock(connection) + rest_ms
        connection.execute(given_back.values(owner=None, lease_until=until, dirty=leases._STILL_DIRTY))

    _wrap("flowbridge.store.leases.claim", claim)
    _wrap("flowbridge.store.leases.renew", renew)
    _wrap("flowbridge.store.leases.release", release)
    _wrap("flowbridge.store.leases.holds", lambda _, fence: lanes.c.lane == fence.lane)
    _wrap("flowbridge.store.outbox.settle", settle)


def dirty_only() -> None:
    """a claim without `owner is not null`"""
    from flowbridge.store import clock
    from flowbridge.store.tables import lanes

    def claim(original: Any, connection: Any, *arguments: Any, **named: Any) -> Any:
        now = clock.lease_clock(connection)
        left = lanes.c.owner.is_not(None) & (lanes.c.dirty == 0) & (lanes.c.lease_until <= now)
        rows = connection.execute(select(lanes.c.lane, lanes.c.lease_until).where(left).with_for_update()).all()
        hide = update(lanes).where(lanes.c.lane.in_([row.lane for row in rows]))
        connection.execute(hide.values(lease_until=now + 3_600_000))
        claims = original(connection, *arguments, **named)
        for row in rows:
            connection.execute(update(lanes).where(lanes.c.lane == row.lane).values(lease_until=row.lease_until))
        return claims

    _wrap("flowbridge.store.leases.claim", claim)


def short_lease() -> None:
    """a lease far shorter than a request, and nobody checks"""

    def start(original: Any, *arguments: Any, **named: Any) -> None:
        original(*arguments, **{**named, "lease": 1.0})

    def is_held(_: Any, lane: Any) -> bool:
        return bool(time.monotonic() < lane.lease_until)

    _wrap("flowbridge.delivery.worker.Worker.__init__", start)
    _wrap("flowbridge.delivery.lane.Lane.is_held", is_held)


def by_timestamp() -> None:
    """first in, first out by timestamp, on clocks that differ by seconds"""

    def fetch(original: Any, *arguments: Any, **named: Any) -> Sequence[Any]:
        return sorted(original(*arguments, **named), key=lambda row: row.accepted_at)

    skewed_clock()
    _wrap("flowbridge.store.outbox.fetch", fetch)


def skewed_clock() -> None:
    """nothing: each bridge has another clock, wrong by up to ten seconds"""
    skew_ms = random.randint(-10_000, 10_000)
    _wrap("flowbridge.store.clock.now_ms", lambda original: original() + skew_ms)


def slow() -> None:
    """nothing: the homeserver is as slow as for the short lease"""


def key_as_txn_id() -> None:
    """the caller's key as the transaction id"""

    def pending(original: Any, acceptance: Any, caller: Any, room_id: str, event: Any, sending: Any, *rest: Any) -> Any:
        made = original(acceptance, caller, room_id, event, sending, *rest)
        if sending.key is not None:
            made._row = made.row._replace(txn_id=sending.key)
        return made

    _wrap("flowbridge.services.acceptance.Acceptance._pending", pending)


def proxy_404() -> None:
    """a proxy's 404 kills the event"""

    def judge(original: Any, answer: Any) -> Any:
        found = original(answer)
        return replace(found, kind="dead") if answer.status == 404 else found

    _wrap("flowbridge.homeserver.answers.judge", judge)


def blind_trust() -> None:
    """the homeserver is taken to remember for ever"""
    _wrap("flowbridge.delivery.attempt._may_be_forgotten", lambda *_: False)


def one_token() -> None:
    """a renewed token is taken for the one that sent what is in doubt"""

    def prepare(original: Any, attempts: Any, attempt: Any) -> Any:
        attempt.sent_with = None
        return original(attempts, attempt)

    _wrap("flowbridge.delivery.attempt.Attempts.prepare", prepare)


def sure_503() -> None:
    """503 for what the store may have taken"""
    _wrap("flowbridge.store.jobs.may_be_committed", lambda *_: False)


def always_new() -> None:
    """each event of a story is its first message"""
    _wrap("flowbridge.delivery.binding.decide", lambda *_, **__: ("new", ""))


def sure_of_keys() -> None:
    """a room key counts as shared although the request failed"""

    async def send(original: Any, *arguments: Any) -> None:
        with suppress(MatrixError):
            await original(*arguments)

    from flowbridge.errors import MatrixError

    _wrap("flowbridge.encryption.key_server.KeyServer.send_to_device", send)


SEEDS = {
    "early-202": Seed(early_202, "sqlite", ("lost",), SQLITE),
    "new-txn-id": Seed(new_txn_id, "sqlite", ("doubled",), SQLITE),
    "no-fence": Seed(no_fence, "stop", ("overlaps", "stale", "doubled", "out of order"), STOP),
    "dirty-only": Seed(dirty_only, "replicas", ("lost",), BACKLOG),
    "short-lease": Seed(short_lease, "replicas", ("overlaps",), SLOW),
    "by-timestamp": Seed(by_timestamp, "replicas", ("out of order",), BACKLOG),
    "key-as-txn-id": Seed(key_as_txn_id, "sqlite", ("lost", "untrue"), SQLITE),
    "always-new": Seed(always_new, "hooks", ("stories", "doubled"), SQLITE),
    "proxy-404": Seed(proxy_404, "proxy", ("lost",), {"seconds": 6.0, "patience": 15.0}),
    "sure-503": Seed(
        sure_503,
        "network",
        ("untrue",),
        {"seconds": 60.0, "every": 1.0, "rooms": 4, "fire": 32, "states": 0, "matrix": 0},
    ),
    "one-token": Seed(one_token, "renewal", ("doubled",), {"seconds": 20.0, "patience": 20.0}),
    "sure-of-keys": Seed(sure_of_keys, "encrypted", ("unread", "lost"), {"seconds": 20.0, "patience": 30.0}),
    "blind-trust": Seed(blind_trust, "memory", ("doubled",), {"remember": 8.0}),
}
HARMLESS = {
    "skewed-clock": Seed(skewed_clock, "replicas", (), BACKLOG),
    "slow": Seed(slow, "replicas", (), SLOW),
}
SOWN = {**SEEDS, **HARMLESS}


def _find(path: str) -> tuple[Any, str]:
    """`package.module.Class.name`: what holds it, and its name. Raises AttributeError or ModuleNotFoundError."""
    module, *names = path.split(".")
    place: Any = importlib.import_module(module)
    for name in names[:-1]:
        module = f"{module}.{name}"
        place = getattr(place, name) if hasattr(place, name) else importlib.import_module(module)
    getattr(place, names[-1])
    return place, names[-1]


def _put(path: str, value: Any) -> None:
    place, name = _find(path)
    setattr(place, name, value)


def _wrap(path: str, wrapper: Callable[..., Any]) -> None:
    """`wrapper` gets the original first, then its arguments."""
    place, name = _find(path)
    original = getattr(place, name)
    setattr(place, name, lambda *arguments, **named: wrapper(original, *arguments, **named))


def main() -> None:
    words = sys.argv[1:]
    while words and (words[0] in SOWN or "=" in words[0]):
        word = words.pop(0)
        if word in SOWN:
            SOWN[word].sow()
        else:
            path, _, value = word.partition("=")
            _put(path, float(value))
    from flowbridge.cli.main import main as serve

    sys.argv[1:] = words
    serve()


if __name__ == "__main__":
    main()
