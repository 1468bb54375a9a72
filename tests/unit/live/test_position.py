"""flowbridge.live.position"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.errors import BadRequest
from flowbridge.live.position import MARK, Position, mark, parse

TEXT = st.text(min_size=1, max_size=60).filter(lambda text: text.isprintable() and _is_utf8(text))
MARKS = st.lists(st.text(min_size=1).filter(lambda text: _is_utf8(text)).map(mark), max_size=100).map(tuple)


def _is_utf8(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


@given(TEXT)
def test_position_between_two_batches_comes_back_as_it_was(until: str) -> None:
    assert parse(str(Position(until))) == Position(until)


@given(TEXT, TEXT, TEXT, st.one_of(st.just(""), TEXT), MARKS)
def test_position_inside_a_batch_comes_back_as_it_was(
    until: str, since: str, room: str, page: str, done: tuple[str, ...]
) -> None:
    position = Position(until, since, room, page, done)
    text = str(position)
    assert parse(text) == position
    assert text.isascii()
    assert not set(text) & set(" \r\n\0")


@pytest.mark.parametrize("token", ["s72594_4483_1934", "m12~3.4~5.6_7", "12", "a,b c/ü%"])
def test_tokens_of_homeservers_are_kept_to_the_letter(token: str) -> None:
    assert parse(str(Position(token))).until == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "s1,",
        "s1,s0",
        "s1,s0,!r,",
        "s1,,!r,,",
        "s1,s0,!r,,abc",
        "s1,s0,%21r,,12345678,",
        "s1 ",
        "%ff",
        "%0a",
        "ü",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        parse(text)


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(BadRequest):
        parse("s" * 8_193)


def test_marks_have_one_length_and_differ() -> None:
    marks = {mark(f"$event-{number}") for number in range(10_000)}
    assert len(marks) == 10_000
    assert {len(found) for found in marks} == {MARK}
