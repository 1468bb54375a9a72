"""Whose request it is behind proxies: what X-Forwarded-For says, as far as it can be believed."""

from ipaddress import ip_network

import pytest

from flowbridge.limits.proxies import MAX_HOPS, Proxies, network_of

OURS = Proxies((ip_network("10.0.0.0/8"), ip_network("127.0.0.1"), ip_network("2001:db8::/32")))
PEER = "10.0.0.1"


@pytest.mark.parametrize(
    ("values", "client"),
    [
        ([b"192.0.2.1"], "192.0.2.1"),
        ([b"203.0.113.9, 192.0.2.1"], "192.0.2.1"),
        ([b"10.9.9.9, 192.0.2.1"], "192.0.2.1"),
        ([b"192.0.2.1, 10.0.0.2, 127.0.0.1"], "192.0.2.1"),
        ([b"203.0.113.9", b"192.0.2.1, 10.0.0.2"], "192.0.2.1"),
        ([b"<script>, 192.0.2.1"], "192.0.2.1"),
        ([b" 192.0.2.1\t"], "192.0.2.1"),
        ([b"192.0.2.1:4711"], "192.0.2.1"),
        ([b"[2a00::1]:4711"], "2a00::1"),
        ([b"[2a00::1]"], "2a00::1"),
        ([b"2A00::1, 2001:db8::1"], "2a00::1"),
        ([b"::ffff:192.0.2.1"], "192.0.2.1"),
        ([b"::ffff:10.0.0.2"], "10.0.0.2"),
        ([b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ([], PEER),
        ([b""], PEER),
        ([b"unknown"], PEER),
        ([b"192.0.2.1, unknown"], PEER),
        ([b"192.0.2.1,"], PEER),
        ([b"192.0.2.1, , 10.0.0.2"], PEER),
        ([b"192.0.2.300"], PEER),
        ([b"192.0.2.1:"], PEER),
        ([b"192.0.2.1:80:80"], PEER),
        ([b"[2a00::1"], PEER),
        ([b"[2a00::1]x"], PEER),
        ([b"192.0.2.1\xc3\xa4"], PEER),
        ([b"1" * 60_000], PEER),
        ([b", ".join([b"10.0.0.2"] * MAX_HOPS)], "10.0.0.2"),
        ([b", ".join([b"10.0.0.2"] * (MAX_HOPS + 1))], PEER),
        ([b", ".join([b"192.0.2.1"] + [b"10.0.0.2"] * 5_000)], PEER),
        ([b", ".join([b"x"] * 5_000 + [b"192.0.2.1"])], "192.0.2.1"),
    ],
)
def test_client_is_the_right_most_address_that_is_no_proxy(values: list[bytes], client: str) -> None:
    assert OURS.client(PEER, values) == client


@pytest.mark.parametrize("peer", ["192.0.2.9", "11.0.0.1", "", "2a00::1"])
def test_peer_that_is_no_proxy_speaks_for_itself(peer: str) -> None:
    assert OURS.client(peer, [b"198.51.100.1"]) == peer


def test_without_the_setting_no_proxy_is_trusted() -> None:
    proxies = Proxies(())
    assert not proxies
    assert not proxies.trusts(PEER)
    assert proxies.client(PEER, [b"198.51.100.1"]) == PEER


@pytest.mark.parametrize("address", ["10.255.0.1", "::ffff:10.0.0.1", "127.0.0.1", "2001:db8::5"])
def test_proxy_is_known_however_its_address_is_written(address: str) -> None:
    assert OURS.trusts(address)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("", ""),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_connections_are_counted_by_ipv4_address_or_by_64_bits(address: str, network: str) -> None:
    assert network_of(address) == network
