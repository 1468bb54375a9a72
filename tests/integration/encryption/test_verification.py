"""Interactive verification with matrix-js-sdk, which begins it, over a real Synapse."""

import asyncio

from flowbridge.encryption import sas
from flowbridge.encryption.sas import Verification
from tests.integration.encryption.bot import Bot
from tests.integration.encryption.test_rooms import joined
from tests.patience import PATIENCE
from tests.peer import Peer


async def begun(device: Bot, peer: Peer) -> None:
    """The peer knows the device, and has asked for a verification."""
    await joined(peer, await device.room())
    await device.machine.fresh(0.0)
    whose = {"user_id": device.account.user_id, "device_id": device.account.device_id}
    await asyncio.to_thread(peer.ask, "begin", **whose)


async def asking(device: Bot, peer: Peer) -> list[Verification]:
    """As `flowbridge device verify` does: the emoji are left to a person."""
    found: list[Verification] = []
    verifications = device.machine.verifications
    verifications.users, verifications.compare = frozenset({peer.me["user_id"]}), found.append
    await begun(device, peer)
    return found


async def over(device: Bot, verification: Verification) -> None:
    async with asyncio.timeout(PATIENCE):
        while not verification.is_over:
            await device.machine.fresh(0.0)


async def is_verified(device: Bot, peer: Peer) -> bool:
    """Whether the peer shows the bot as verified; its own signature comes back to it by a sync."""
    answer = await asyncio.to_thread(peer.ask, "identity", user_id=device.account.user_id)
    return bool(answer["verified"])


async def becomes_verified(device: Bot, peer: Peer) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await is_verified(device, peer):
            await device.machine.fresh(0.0)


async def signers(device: Bot, peer: Peer) -> set[str]:
    """Whose signatures the peer's master key has, as far as the bot may see them."""
    user = peer.me["user_id"]
    told = await device.call("POST", "keys/query", {"device_keys": {user: []}})
    return set(told["master_keys"][user].get("signatures", {}))


async def test_both_are_verified_once_the_emoji_match(device: Bot, peer: Peer) -> None:
    found = await asking(device, peer)
    shown = await asyncio.to_thread(peer.ask, "compare")
    (verification,) = found
    assert [list(emoji) for emoji in verification.shown] == shown["emoji"]
    assert device.account.user_id not in await signers(device, peer)
    await device.machine.verifications.confirm(verification, matches=True)
    assert await asyncio.to_thread(peer.ask, "decide", how="confirm") == {"verified": True}
    await over(device, verification)
    assert verification.succeeded
    await becomes_verified(device, peer)
    assert device.account.user_id in await signers(device, peer)


async def test_listed_user_is_verified_without_a_question(device: Bot, peer: Peer) -> None:
    device.machine.verifications.users = frozenset({peer.me["user_id"]})
    await begun(device, peer)
    await asyncio.to_thread(peer.ask, "compare")
    assert await asyncio.to_thread(peer.ask, "decide", how="confirm") == {"verified": True}
    await becomes_verified(device, peer)
    assert device.account.user_id in await signers(device, peer)


async def test_emoji_that_do_not_match_here_verify_nobody(device: Bot, peer: Peer) -> None:
    found = await asking(device, peer)
    await asyncio.to_thread(peer.ask, "compare")
    await device.machine.verifications.confirm(found[0], matches=False)
    assert await asyncio.to_thread(peer.ask, "outcome") == {"cancelled": "m.mismatched_sas"}
    assert not found[0].succeeded
    assert not await is_verified(device, peer)
    assert device.account.user_id not in await signers(device, peer)


async def test_emoji_that_do_not_match_there_verify_nobody(device: Bot, peer: Peer) -> None:
    found = await asking(device, peer)
    await asyncio.to_thread(peer.ask, "compare")
    await asyncio.to_thread(peer.ask, "decide", how="mismatch")
    await over(device, found[0])
    assert (found[0].succeeded, found[0].trouble) == (False, "the other side: the emoji do not match")
    await device.machine.verifications.confirm(found[0], matches=True)
    assert device.account.user_id not in await signers(device, peer)


async def test_client_that_cancels_ends_it(device: Bot, peer: Peer) -> None:
    found = await asking(device, peer)
    await asyncio.to_thread(peer.ask, "compare")
    await asyncio.to_thread(peer.ask, "decide", how="cancel")
    await over(device, found[0])
    assert not found[0].succeeded


async def test_client_is_told_when_it_took_too_long(device: Bot, peer: Peer) -> None:
    found = await asking(device, peer)
    await asyncio.to_thread(peer.ask, "compare")
    found[0].ends_at = 0.0
    assert await asyncio.to_thread(peer.ask, "outcome") == {"cancelled": "m.timeout"}
    assert found[0].trouble == sas.REASONS["m.timeout"]


async def test_request_of_a_user_who_is_not_listed_gets_no_answer(device: Bot, peer: Peer) -> None:
    device.machine.verifications.users = frozenset({"@someone:else"})
    await begun(device, peer)
    await device.machine.fresh(0.0)
    assert device.machine.verifications.last is None
