"""flowbridge.delivery.breaker: the homeserver cannot be reached, and is there again."""

import asyncio

import pytest

from flowbridge.delivery.breaker import FAILURES
from flowbridge.errors import HomeserverError, MatrixError
from flowbridge.homeserver import answers as verdicts
from tests.rig import (
    BOB,
    MakeRig,
    after,
    cut,
    error,
    raw,
    refuse_connection,
    slow,
    soon,
    unreachable,
    until,
)
from tests.unit.delivery.test_attempt import HTML, carry, verdict


@pytest.fixture
def quick_probe(make: MakeRig) -> None:
    make.tune(first_probe_pause=0.01, max_probe_pause=0.01)


@pytest.mark.usefixtures("quick_probe")
async def test_after_five_failures_to_connect_only_versions_are_asked_for(make: MakeRig) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.always(refuse_connection)
        rooms.version = unreachable()
        for number in range(FAILURES):
            assert not rig.breaker.is_open, number
            await verdict(rig)
        assert rig.breaker.is_open
        assert rig.account_limits.pause_of("anybody") == float("inf")
        tasks = [asyncio.ensure_future(carry(rig, rig.pending("a", caller=BOB).row)) for _ in range(10)]
        await until(lambda: rooms.looks.count(("versions", "")) >= 3)
        assert len(rooms.sends) == FAILURES
        rooms.always(None)
        rooms.version = None
        for task in tasks:
            assert (await soon(task)).kind == "sent"
        assert not rig.breaker.is_open


@pytest.mark.usefixtures("quick_probe")
async def test_after_an_outage_the_first_goes_alone(make: MakeRig) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.always(refuse_connection)
        for _ in range(FAILURES):
            await verdict(rig)
        answered = asyncio.Event()
        rooms.script(lambda _: after(answered))
        rooms.sends.clear()
        tasks = [asyncio.ensure_future(carry(rig, rig.pending("a").row)) for _ in range(50)]
        await until(lambda: rooms.sends)
        await until(lambda: not rig.breaker.is_open)
        assert len(rooms.sends) == 1
        answered.set()
        for task in tasks:
            assert (await soon(task)).kind == "sent"


@pytest.mark.parametrize("answer", ["429", "500", "a proxy's", "a timeout"])
async def test_any_answer_shows_that_the_homeserver_is_there(make: MakeRig, answer: str) -> None:
    behaviours = {"429": slow(1), "500": error(500, "M_UNKNOWN"), "a proxy's": raw(HTML), "a timeout": cut}
    async with make() as rig:
        for _ in range(FAILURES - 1):
            rig.rooms.then(refuse_connection)
            await verdict(rig)
        rig.rooms.then(behaviours[answer], refuse_connection)
        await verdict(rig)
        await verdict(rig)
        assert not rig.breaker.is_open


async def test_proxy_that_refuses_a_look_up_does_not_make_the_homeserver_be_away(make: MakeRig) -> None:
    """One room that a firewall does not like must not stop all others."""
    async with make(refuse_encrypted=True) as rig:
        rig.rooms.encrypted["!bad:hs"] = verdicts.error(HTML)
        for _ in range(2 * FAILURES):
            assert (await verdict(rig, room="!bad:hs")).kind == "again"
        assert not rig.breaker.is_open


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize("odd", [HomeserverError("slow", errcode="M_LIMIT_EXCEEDED", status=429), RuntimeError("")])
async def test_probing_ends_whatever_the_probe_brings(make: MakeRig, odd: Exception) -> None:
    async with make() as rig:
        rooms = rig.rooms
        rooms.always(refuse_connection)
        rooms.version = odd  # type: ignore[assignment]
        for _ in range(FAILURES):
            await verdict(rig)
        await until(lambda: rooms.looks)
        rooms.always(None)
        if not isinstance(odd, MatrixError):
            rooms.version = None
        assert (await verdict(rig)).kind == "sent"
