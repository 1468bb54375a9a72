"""flowbridge.models.macaroons: the tokens that pymacaroons, and so Synapse, fails at, by asking pymacaroons itself."""

import base64
import random
import secrets

import pymacaroons
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pymacaroons.exceptions import MacaroonException

from flowbridge.models import macaroons
from flowbridge.settings import is_token

VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


def packet(key: bytes, value: bytes) -> bytes:
    content = key + b" " + value + b"\n"
    return b"%04x" % (len(content) + 4) + content


PACKETS = [
    packet(b"location", b"localhost"),
    packet(b"identifier", b"key"),
    packet(b"cid", b"guest = true"),
    packet(b"vid", b"x"),
    packet(b"cl", b"x"),
    packet(b"signature", b"s" * 32),
    b"000",
    b"zzzz",
    b"0",
]


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def reading(token: str) -> str:
    """How reading it ends: "read", "refused" by what Synapse catches, or "failed"."""
    try:
        pymacaroons.Macaroon.deserialize(token)
    except (MacaroonException, TypeError, ValueError, KeyError):
        return "refused"
    except Exception:
        return "failed"
    return "read"


@given(VISIBLE)
@example("None")
@example("NULL")
@example("NaN")
@example("null")
@example("undefined")
@example("{}")
@example("=")
@example("N/A")
@example("syt_YWxpY2U_abcdefghijklmnopqrst_0VVM2k")
def test_text_is_judged_as_synapse_takes_it(token: str) -> None:
    assert (macaroons.breaks(token) or macaroons.may_break(token)) >= (reading(token) == "failed")
    assert not (macaroons.breaks(token) and reading(token) == "read")


@given(st.lists(st.sampled_from(PACKETS), min_size=1, max_size=6).map(b"".join))
@example(PACKETS[3])
@example(PACKETS[2] + PACKETS[3])
@example(PACKETS[0] + b"0")
def test_macaroon_of_version_1_is_judged_as_synapse_takes_it(data: bytes) -> None:
    how = reading(encoded(data))
    assert macaroons.breaks(encoded(data)) in {"failed": [True], "read": [False]}.get(how, [True, False])


@given(st.binary(max_size=60).map(lambda data: b"\2" + data))
@example(b"\2")
@example(b"\2\xff")
@example(b"\2\1\xff\xff")
def test_macaroon_of_version_2_may_break_where_it_does(data: bytes) -> None:
    assert macaroons.may_break(encoded(data)) >= (reading(encoded(data)) == "failed")
    assert not macaroons.breaks(encoded(data))


def test_packet_that_would_lead_back_is_refused() -> None:
    """pymacaroons would read it for ever."""
    assert macaroons.breaks(encoded(packet(b"cid", b"x") + b"-00acid "))


@pytest.mark.parametrize("make", [lambda: secrets.token_urlsafe(32), lambda: secrets.token_hex(16), lambda: "tok"])
def test_tokens_that_homeservers_make_are_good(make: object) -> None:
    random.seed(0)
    assert callable(make)
    for _ in range(5_000):
        assert is_token(make())
    guest = pymacaroons.Macaroon(location="localhost", identifier="key", key="secret")
    guest.add_first_party_caveat("gen = 1")
    guest.add_first_party_caveat("guest = true")
    assert is_token(guest.serialize())
