"""Who may hold how many connections, and which of them make room."""

from dataclasses import dataclass

import pytest

from flowbridge.homeserver import client, relay
from flowbridge.services.media import files as media
from flowbridge.web import connections, file_limit
from flowbridge.web.connections import Connections
from flowbridge.web.routes import passthrough

HOG = "192.0.2.1"
QUIET = "198.51.100.7"
PROXY = "10.0.0.1"


@dataclass(eq=False)
class Fake:
    closed: bool = False

    def evict(self) -> None:
        self.closed = True


def among(most: int = 8, files: int | None = None) -> Connections:
    return Connections(lambda address: address == PROXY, most=most, files=files)


def fill(found: Connections, address: str, number: int, *, idle: bool = False) -> list[Fake]:
    made = [Fake() for _ in range(number)]
    for one in made:
        assert found.admit(one, address) == ""
        if not idle:
            found.mark_busy(one)
    return made


def test_address_has_half_of_them_and_another_one_the_rest() -> None:
    found = among()
    fill(found, HOG, 4)
    assert "at most 4" in found.admit(Fake(), HOG)
    fill(found, QUIET, 4)
    assert found.admit(Fake(), "203.0.113.1") == "too many connections"
    assert len(found) == 8


def test_proxy_has_all_of_them() -> None:
    found = among()
    fill(found, PROXY, 8)
    assert found.admit(Fake(), PROXY) == "too many connections"


def test_subscriber_with_a_network_of_ipv6_is_one() -> None:
    found = among()
    for number in range(4):
        fill(found, f"2001:db8::{number}", 1)
    assert "2001:db8::/64" in found.admit(Fake(), "2001:db8::ffff:1")
    assert found.admit(Fake(), "2001:db8:0:1::1") == ""


def test_ipv4_that_is_written_as_ipv6_is_the_same_address() -> None:
    found = among()
    fill(found, HOG, 4)
    assert found.admit(Fake(), f"::ffff:{HOG}")


def test_own_idle_connections_make_room_first_the_longest_idle() -> None:
    found = among()
    fill(found, HOG, 2)
    first, second = fill(found, HOG, 2, idle=True)
    found.mark_busy(first)
    found.mark_idle(first)
    others = fill(found, QUIET, 2, idle=True)
    assert found.admit(Fake(), HOG) == ""
    assert [first.closed, second.closed] == [False, True]
    assert not any(other.closed for other in others)
    assert len(found) == 6


def test_longest_idle_of_all_makes_room_when_all_are_taken() -> None:
    found = among()
    (first,) = fill(found, QUIET, 1, idle=True)
    rest = fill(found, PROXY, 7, idle=True)
    assert found.admit(Fake(), HOG) == ""
    assert first.closed
    assert not any(other.closed for other in rest)


def test_ended_connections_do_not_count() -> None:
    found = among()
    made = fill(found, HOG, 4) + fill(found, HOG, 0)
    for one in made:
        found.remove(one)
        found.remove(one)
    assert len(found) == 0
    fill(found, HOG, 4)


def test_refused_connection_does_not_count() -> None:
    found = among()
    made = fill(found, HOG, 4)
    refused = Fake()
    assert found.admit(refused, HOG)
    found.mark_busy(refused)
    found.mark_idle(refused)
    found.remove(refused)
    found.remove(made[0])
    assert found.admit(Fake(), HOG) == ""


def test_evicted_connection_that_ends_later_is_not_counted_twice() -> None:
    found = among(most=2)
    (evicted,) = fill(found, HOG, 1, idle=True)
    assert found.admit(Fake(), HOG) == ""
    found.mark_idle(evicted)
    found.remove(evicted)
    assert len(found) == 1


def test_files_are_left_for_the_store_and_the_homeserver() -> None:
    found = among(files=10_000)
    first = 10_000 - connections.RESERVED_FILES
    last = Fake()
    assert found.admit(last, HOG, first - 1) == ""
    fill(found, QUIET, 1)
    found.mark_busy(last)
    assert found.admit(Fake(), HOG, first) == "too many open files"


def test_low_limit_of_files_leaves_some_to_callers() -> None:
    found = among(files=64)
    assert found.admit(Fake(), HOG, 47) == ""


def test_refusals_are_one_line_in_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr("flowbridge.web.connections.time.monotonic", lambda: now)
    found = among()
    fill(found, HOG, 4)
    for _ in range(5):
        found.admit(Fake(), HOG)
    now += connections.QUIET_SECONDS
    found.admit(Fake(), HOG)
    lines = [vars(record)["fields"] for record in caplog.records]
    assert [line["refused"] for line in lines] == [1, 5]
    assert lines[0]["client"] == HOG
    assert "FLOWBRIDGE_TRUSTED_PROXIES" in lines[0]["hint"]
    fill(found, QUIET, 4)
    found.admit(Fake(), "203.0.113.1")
    line = vars(caplog.records[-1])["fields"]
    assert (line["bound"], line["of_client"]) == ("total", 4)
    assert "hint" not in line


def test_files_suffice_for_all_that_may_be_open_at_once() -> None:
    passing = relay.MAX_AT_ONCE + relay.GUESTS
    upstream = client.CALLS + client.READERS + client.POLLS + client.GUESTS + passing
    spools = media.MAX_SPOOLS + passthrough.MAX_LONG
    assert connections.MAX_CONNECTIONS + upstream + spools < file_limit.WANTED
    assert passing < connections.RESERVED_FILES
