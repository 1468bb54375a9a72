"""flowbridge.delivery.account_limits: whose tokens are not accepted any more, and what is remembered of accounts."""

import asyncio
import time
from dataclasses import replace
from itertools import pairwise

from cryptography.fernet import Fernet

from flowbridge.homeserver.answers import Verdict
from flowbridge.models import Caller
from flowbridge.store import accounts
from flowbridge.store.clock import now_ms
from tests.rig import (
    ALICE,
    DESK,
    KEY,
    PATIENCE,
    MakeRig,
    Rig,
    error,
    soon,
)
from tests.unit.delivery.test_attempt import carry, verdict


async def test_account_goes_on_at_once_with_a_new_token(make: MakeRig) -> None:
    make.tune(token_pause=2 * PATIENCE)
    async with make() as rig:
        rig.rooms.script(lambda sent: None if sent.token == "new" else error(401, "M_UNKNOWN_TOKEN"))
        assert (await verdict(rig)).kind == "token"
        waiting = asyncio.ensure_future(carry(rig, rig.pending("a").row))
        await asyncio.sleep(0)
        rig.tokens.remember(replace(ALICE, token="new"))
        found = await soon(waiting)
        assert found.kind == "sent"
        assert rig.account_limits.distrusted == {}


async def test_token_that_another_process_was_given_is_used_after_the_pause(make: MakeRig) -> None:
    async def forget(account: str, token: str) -> None:
        rig.tokens.forget(account)

    make.tune(token_pause=0.05)
    async with make(on_distrust=forget) as rig:
        rig.rooms.script(lambda sent: None if sent.token == "new" else error(401, "M_UNKNOWN_TOKEN"))
        row = rig.pending("a").row
        assert (await carry(rig, row) or Verdict("dead")).kind == "token"
        await write_token(rig, replace(ALICE, token="new"))
        assert (await carry(rig, row) or Verdict("dead")).kind == "sent"


async def test_permit_takes_all_that_a_request_needs_or_waits_for_it(make: MakeRig) -> None:
    async with make() as rig:
        limits = rig.account_limits
        window, everyone = limits.limiter("a"), limits.everyone
        async with limits.permit("a", ahead=False):
            assert (window.in_flight, everyone.in_flight, limits.places.is_idle) == (1, 1, False)
        assert (window.in_flight, everyone.in_flight, limits.places.is_idle) == (0, 0, True)
        for closed in (window, everyone):
            closed.shut()
            entered = asyncio.Event()

            async def hold(entered: asyncio.Event = entered) -> None:
                async with limits.permit("a", ahead=True):
                    entered.set()

            given_up, waiting = asyncio.ensure_future(hold()), asyncio.ensure_future(hold())
            await asyncio.sleep(0.01)
            assert not entered.is_set()
            given_up.cancel()
            await asyncio.wait([given_up])
            closed.open()
            await soon(waiting)
            assert entered.is_set()
            assert (window.in_flight, everyone.in_flight, limits.places.is_idle) == (0, 0, True)


async def write_token(rig: Rig, caller: Caller) -> None:
    """As another process does that shares the store."""
    account = {
        "account": accounts.account_of(caller.user_id),
        "user_id": caller.user_id,
        "device_id": caller.device_id,
        "token": Fernet(KEY).encrypt(caller.token.encode()).decode(),
        "token_hash": accounts.token_hash(caller.token),
        "seen_at": now_ms(),
    }
    await rig.database.run(lambda connection: accounts.remember(connection, account))


async def test_account_whose_token_is_not_in_the_store_is_paused(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row._replace(account="nobody")
        found = await carry(rig, row)
        assert found is not None
        assert (found.kind, rig.rooms.sends) == ("token", [])
        assert list(rig.account_limits.distrusted) == ["nobody"]


async def test_refused_token_is_told_once_a_pause_and_not_at_each_answer(make: MakeRig) -> None:
    """Whoever is told logs in anew; if that is refused just so, it must not become a storm of logins."""
    make.tune(token_pause=0.2)
    told: list[float] = []
    numbers = iter(range(10_000))

    async def log_in(account: str, token: str) -> None:
        told.append(time.monotonic())
        rig.tokens.forget(account)
        rig.tokens.remember(replace(ALICE, token=f"new-{next(numbers)}"))

    async with make(on_distrust=log_in) as rig:
        rig.rooms.always(error(401, "M_USER_LOCKED"))
        row = rig.pending("a").row
        answers = 0
        while len(told) < 4:
            await carry(rig, row)
            answers += 1
        pauses = [later - earlier for earlier, later in pairwise(told)]
        assert min(pauses) > 0.2 / 4, pauses
        assert answers > len(told)


async def test_refused_token_is_not_tried_again_until_the_homeserver_has_said_whose_it_is(make: MakeRig) -> None:
    make.tune(token_pause=0.01)
    refused: list[str] = []
    async with make(on_refused=refused.append) as rig:
        rig.rooms.then(error(401, "M_USER_LOCKED", "it is locked"))
        row = rig.pending("a").row
        for _ in range(3):
            assert (await carry(rig, row) or Verdict("dead")).kind == "token"
        assert (len(rig.rooms.sends), refused) == (1, ["alice"])
        assert rig.account_limits.waits_for(row.account) == "no access token of its account is accepted: it is locked"
        rig.tokens.remember(ALICE)  # as whoever asks the homeserver does
        assert (await carry(rig, row) or Verdict("dead")).kind == "sent"
        assert rig.account_limits.waits_for(row.account) == ""


async def test_another_token_of_the_user_sends_what_one_that_is_refused_cannot(make: MakeRig) -> None:
    async with make() as rig:
        row = rig.pending("a").row
        rig.tokens.remember(DESK)
        rig.rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.token == "desk" else None)
        assert (await carry(rig, row) or Verdict("dead")).kind == "token"
        assert rig.account_limits.distrusted == {}
        assert rig.account_limits.pause_of(row.account) == 0
        assert (await carry(rig, row) or Verdict("dead")).kind == "sent"
        assert [sent.token for sent in rig.rooms.sends] == ["desk", "alice"]


async def test_accounts_that_send_no_more_are_forgotten(make: MakeRig) -> None:
    async with make(max_accounts=10) as rig:
        rig.rooms.script(lambda sent: error(401, "M_UNKNOWN_TOKEN") if sent.body == "bad" else None)
        await verdict(rig, "bad")
        for number in range(100):
            await verdict(rig, caller=Caller(f"@user-{number}:hs", "PHONE", f"token-{number}"))
        assert len(rig.account_limits) <= 11
        assert rig.account_limits.pause_of(accounts.account_of(ALICE.user_id)) > 0  # a pause is not forgotten
        rig.account_limits.limiter(accounts.account_of(ALICE.user_id)).open()
        for number in range(20):
            await verdict(rig, caller=Caller(f"@other-{number}:hs", "PHONE", f"token-{number}"))
        assert rig.account_limits.distrusted == {}
