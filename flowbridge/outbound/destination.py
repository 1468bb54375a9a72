"""Where a request for a caller may go: to public addresses, and to what FLOWBRIDGE_FETCH_ALLOW names.

A name is resolved once, and the connection is made to an address that was checked: a second look-up could answer
something else (DNS rebinding).
"""

import asyncio
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self

import anyio
import httpcore

from flowbridge.settings import Network

MAX_ADDRESSES: Final = 4  # of one name that are tried
LOOKUPS: Final = 16  # at a time: a resolver may take 30 s over a name, and asyncio's own threads serve others, too

_UNICAST: Final = IPv6Network("2000::/3")
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
# Inside 2000::/3: protocol assignments with Teredo, documentation, and 6to4, which hides an IPv4 address.
_SPECIAL: Final = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_RELAYS: Final = ip_network("192.88.99.0/24")  # of 6to4


class Refused(Exception):
    """This address may not be asked for a caller. The message is a clause: "leads to a private address"."""


class Allowed:
    """Host names, addresses and networks that may be asked although they are private."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        hosts, networks = set(), []
        for entry in entries:
            try:
                networks.append(ip_network(entry))
            except ValueError:
                hosts.add(entry.lower().rstrip("."))
        self._hosts = frozenset(hosts)
        self._networks: tuple[Network, ...] = tuple(networks)

    def names(self, host: str) -> bool:
        return host.lower().rstrip(".") in self._hosts

    def holds(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether this is an address on the internet. One that leads to an IPv4 address is judged by that."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and address not in _RELAYS
    if address in _MAPPED or address in _NAT64:
        return is_public(IPv4Address(address.packed[12:]))
    return address in _UNICAST and not any(address in network for network in _SPECIAL)


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """httpcore's network, for permitted addresses alone. TLS still verifies the name that the URL holds."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="flowbridge-lookup")
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's interface)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises Refused, httpcore.ConnectError or httpcore.ConnectTimeout."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._addresses(host, port)
                failure: httpcore.ConnectError | None = None
                for address in addresses[:MAX_ADDRESSES]:
                    try:
                        return await self._network.connect_tcp(str(address), port, timeout)
                    except httpcore.ConnectError as error:
                        failure = error
        except TimeoutError:
            raise httpcore.ConnectTimeout("no connection in time") from None
        raise failure or httpcore.ConnectError("the name has no address")

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[IPv4Address | IPv6Address]:
        """Those of a host that may be asked. Every spelling of an address is one to the resolver, too."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._threads, _resolve, host, port)
        except (OSError, UnicodeError):
            raise httpcore.ConnectError(f"the name {host[:255]} is not known") from None
        if self._allowed.names(host):
            return found
        permitted = [address for address in found if is_public(address) or self._allowed.holds(address)]
        if found and not permitted:
            raise Refused("leads to an address that is not on the internet; FLOWBRIDGE_FETCH_ALLOW permits such ones")
        return permitted

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _resolve(host: str, port: int) -> list[IPv4Address | IPv6Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = (ip_address(str(address[0])) for *_, address in found)
    return list(dict.fromkeys(addresses))
