"""flowbridge.limits.peer: whose share of a bound it is."""

import asyncio

from flowbridge.limits import peer


async def test_name_goes_with_the_request_and_with_what_it_starts() -> None:
    async def request(host: str) -> list[str]:
        peer.enter({"client": (host, 1)})
        found = [peer.who(), str(peer.is_guest())]
        await asyncio.sleep(0)
        peer.identified(f"user at {host}")
        found += [peer.who(), str(peer.is_guest()), await asyncio.create_task(inner()), await own()]
        return [*found, peer.who(), peer.address()]

    async def inner() -> str:
        return peer.who()

    @peer.own_work
    async def own() -> str:
        peer.identified("nobody")
        return peer.who() + peer.address()

    hosts = ("1.1.1.1", "2.2.2.2")
    for host, found in zip(hosts, await asyncio.gather(*map(request, hosts)), strict=True):
        assert found == [host, "True", f"user at {host}", "False", f"user at {host}", "", f"user at {host}", host]
    assert (peer.who(), peer.address(), peer.is_guest()) == ("", "", False)
