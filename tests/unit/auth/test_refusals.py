"""flowbridge.auth.refusals: wrong keys and tokens are looked up once, and slowed."""

import pytest

from flowbridge.auth.refusals import Refusals
from flowbridge.errors import TooMany, Unauthorized
from flowbridge.models.timing import Timing
from tests.unit import Clock

WRONG = Unauthorized("it is wrong", soft_logout=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def digest(number: int) -> bytes:
    return str(number).encode()


def fail(found: Refusals, number: int, address: str = "hog") -> None:
    found.check(address, digest(number))
    found.note(address, digest(number), WRONG)


def test_refusal_is_given_again_for_some_seconds(clock: Clock) -> None:
    found = Refusals(5, timing=Timing(clock=clock))
    fail(found, 1)
    with pytest.raises(Unauthorized, match="it is wrong") as caught:
        found.check("other", digest(1))
    assert caught.value.extra == {"soft_logout": True}
    found.check("hog", digest(2))
    clock.now += Timing().refusal_seconds
    found.check("other", digest(1))


def test_address_with_too_many_wrong_secrets_has_to_wait(clock: Clock) -> None:
    found = Refusals(5, timing=Timing(clock=clock))
    for number in range(5):
        fail(found, number)
    with pytest.raises(TooMany, match="more than 5 wrong keys or tokens a minute come from hog") as caught:
        found.check("hog", digest(99))
    assert caught.value.headers() == {"Retry-After": "12"}
    found.check("other", digest(99))
    clock.now += 12
    fail(found, 99)
    with pytest.raises(TooMany):
        found.check("hog", digest(100))


def test_one_wrong_secret_again_and_again_leaves_others_of_its_address_alone(clock: Clock) -> None:
    found = Refusals(5, timing=Timing(clock=clock))
    fail(found, 1)
    for _ in range(4):
        with pytest.raises(Unauthorized):
            found.check("hog", digest(1))
    with pytest.raises(TooMany):
        found.check("hog", digest(1))
    found.check("hog", digest(2))


def test_memory_is_bounded(clock: Clock) -> None:
    found = Refusals(1, timing=Timing(clock=clock), max_kept=10)
    for number in range(50):
        fail(found, number, f"address {number}")
    for number in range(50, 60):
        found.check("address 0", digest(number - 50))  # neither the address nor the refusal is remembered
    with pytest.raises(TooMany):
        found.check("address 49", digest(99))
    with pytest.raises(Unauthorized):
        found.check("other", digest(49))


def test_bridge_itself_is_never_slowed(clock: Clock) -> None:
    found = Refusals(1, timing=Timing(clock=clock))
    for _ in range(5):
        fail(found, 1, "")
