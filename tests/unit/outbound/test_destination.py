"""flowbridge.outbound.destination: which addresses a caller's URL may lead to."""

import socket
from ipaddress import ip_address
from typing import Any

import httpcore
import pytest

from flowbridge.outbound import destination
from flowbridge.outbound.destination import Allowed, CheckedBackend, Refused, is_public

# ruff: noqa: SIM905 (lists of addresses read better as text)
PRIVATE = """
    127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254
    100.64.0.1 100.127.255.255 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255
    240.0.0.1 255.255.255.255 192.88.99.1 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe
    64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b:1::1 fe80::1 fe80::1%eth0 fc00::1 fd12:3456::1 fec0::1 ff02::1 2001::1
    2001:db8::1 2002:7f00:1:: 2002:a00:1::1 3fff::1 100::1
""".split()
PUBLIC = """
    1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808
""".split()
SPELLINGS = """
    127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 0 0.0.0.0 ::1 ::ffff:127.0.0.1
    localhost localhost. LOCALHOST ip6-localhost
""".split()


@pytest.mark.parametrize("text", PRIVATE)
def test_private_and_special_addresses_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_addresses_of_the_internet_are_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("host", SPELLINGS)
async def test_every_spelling_of_this_machine_is_refused(host: str) -> None:
    with CheckedBackend(Allowed()) as backend, pytest.raises((Refused, httpcore.ConnectError)) as caught:
        await backend.connect_tcp(host, 9, 5)
    assert "refused" not in str(caught.value).lower(), "it was connected to"


async def test_name_is_looked_up_once_and_the_connection_goes_to_the_checked_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, connected, stream = [], [], httpcore.AsyncMockStream([])

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        addresses = ["93.184.216.34", "10.0.0.1"] if len(asked) == 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    async def connect(self: object, host: str, port: int, timeout: float | None) -> object:  # noqa: ASYNC109
        connected.append(host)
        return stream

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    with CheckedBackend(Allowed()) as backend:
        assert await backend.connect_tcp("rebinding.example", 80, 5) is stream
        assert (asked, connected) == (["rebinding.example"], ["93.184.216.34"])
        with pytest.raises(Refused, match="not on the internet"):
            await backend.connect_tcp("rebinding.example", 80, 5)


@pytest.mark.parametrize("entry", ["127.0.0.0/8", "127.0.0.1", "localhost", "LocalHost."])
def test_allow_list_takes_networks_addresses_and_names(entry: str) -> None:
    allowed = Allowed([entry])
    assert allowed.holds(ip_address("127.0.0.1")) or allowed.names("localhost")
    assert not allowed.holds(ip_address("10.0.0.1"))
    assert not allowed.names("evil-localhost")


async def test_only_a_few_addresses_of_a_name_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    async def connect(self: object, host: str, port: int, timeout: float | None) -> None:  # noqa: ASYNC109
        tried.append(host)
        raise httpcore.ConnectError("no")

    monkeypatch.setattr(destination, "_resolve", lambda host, port: [ip_address(f"1.1.1.{n}") for n in range(1, 100)])
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    with CheckedBackend(Allowed()) as backend, pytest.raises(httpcore.ConnectError):
        await backend.connect_tcp("many.example", 80, 5)
    assert len(tried) == destination.MAX_ADDRESSES
