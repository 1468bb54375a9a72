"""Which address a request comes from, also through proxies: X-Forwarded-For is believed from known proxies."""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_HOPS: Final = 32  # more would be an attempt to keep the bridge busy


class Proxies:
    """The proxies whose X-Forwarded-For counts (FLOWBRIDGE_TRUSTED_PROXIES); with none only the peer's address does."""

    def __init__(self, networks: tuple[Network, ...]) -> None:
        self._networks = networks

    def __bool__(self) -> bool:
        return bool(self._networks)

    def trusts(self, address: str) -> bool:
        """Whether this address is one of them."""
        found = _parse(address) if self._networks else None
        return found is not None and self._contain(found)

    def client(self, peer: str, forwarded: Iterable[bytes]) -> str:
        """The address of the caller. `forwarded`: the values of X-Forwarded-For, in order.

        Each proxy appends the address that called it. So the right-most address that is not a trusted proxy is the
        caller's: the caller may have made up everything to the left of it. When all are trusted, it is the first. A
        malformed header is ignored: then it is the peer's.
        """
        if not self.trusts(peer):
            return peer
        hops = b",".join(forwarded).decode("latin-1").split(",")
        found = peer
        for hop in reversed(hops[-MAX_HOPS:]):
            address = _parse(_without_port(hop.strip(" \t")))
            if address is None:
                return peer
            found = str(address)
            if not self._contain(address):
                return found
        return found if len(hops) <= MAX_HOPS else peer

    def _contain(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


@lru_cache(maxsize=4_096)
def network_of(address: str) -> str:
    """The unit whose connections are counted together: one IPv4 address, or one IPv6 /64."""
    found = _parse(address)
    if not isinstance(found, IPv6Address):
        return str(found) if found is not None else address
    return str(IPv6Network((int(found), 64), strict=False))


@lru_cache(maxsize=4_096)
def _parse(text: str) -> Address | None:
    """The address; an IPv4 address that is written as IPv6 (`::ffff:192.0.2.1`) becomes IPv4."""
    if len(text) > 64:
        return None
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _without_port(hop: str) -> str:
    """`192.0.2.1:443` and `[2001:db8::1]:443`, as some proxies write them."""
    if hop.startswith("["):
        address, bracket, port = hop[1:].partition("]")
        return address if bracket and (not port or (port[0] == ":" and port[1:].isdecimal())) else ""
    address, colon, port = hop.partition(":")
    return address if colon and port.isdecimal() and "." in address else hop
