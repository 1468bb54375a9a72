"""flowbridge.events.stories: what an event is to what was last said of its story."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.events.relations import LONGEST_ID, Binding, Found, bind, largest, unbound
from flowbridge.events.stories import (
    AHEAD_MS,
    LATE_MS,
    MAX_FIRING,
    OLDER,
    SAID,
    Chapter,
    Said,
    Story,
    decide,
    quiet,
)

ONE = Chapter("firing", ("1",), 10, "one")
BOTH = Chapter("firing", ("1", "2"), 20, "both")
DONE = Chapter("resolved", (), 30, "done")
RUNS = Chapter("", (), 10, "runs")


@pytest.mark.parametrize(
    ("chapter", "last", "expected"),
    [
        (ONE, None, ("new", "")),
        (RUNS, None, ("new", "")),
        (DONE, None, ("notice", "")),  # its firing is not known
        # something begins to fire
        (BOTH, ONE, ("new", "")),
        (replace(ONE, time=40), DONE, ("new", "")),
        (replace(ONE, firing=("3",), time=40), BOTH, ("new", "")),  # the others have ended
        (ONE, RUNS, ("new", "")),  # a run that fails
        (Chapter("firing", digest="a"), replace(RUNS, time=None), ("new", "")),
        # nothing does
        (replace(ONE, time=25), BOTH, ("update", "")),
        (replace(ONE, digest="other text"), ONE, ("update", "")),
        (DONE, BOTH, ("update", "")),
        (replace(DONE, digest="and another"), DONE, ("update", "")),
        (replace(RUNS, digest="passed"), RUNS, ("update", "")),
        (replace(RUNS, digest="x"), replace(DONE, time=5), ("update", "")),
        (Chapter("firing", digest="b"), Chapter("firing", digest="a"), ("update", "")),
        # the same
        (ONE, ONE, ("nothing", SAID)),
        (replace(ONE, time=5), ONE, ("nothing", SAID)),
        (replace(ONE, time=None), ONE, ("nothing", SAID)),
        (replace(BOTH, firing=("2", "1")), BOTH, ("nothing", SAID)),  # in another order
        (replace(DONE, digest="one"), replace(ONE, time=30), ("update", "")),  # a template that does not show the state
        (replace(ONE, digest=""), replace(ONE, digest=""), ("update", "")),  # no digest says nothing
        # older
        (ONE, replace(BOTH, digest="x"), ("nothing", OLDER)),
        (replace(ONE, time=29), DONE, ("nothing", OLDER)),
        (replace(DONE, time=9), ONE, ("nothing", OLDER)),
        # older, but of a beginning, or an end, that was not told
        (replace(ONE, time=29, ended=()), replace(DONE, ended=()), ("new", "")),
        (replace(ONE, time=29, ended=()), replace(DONE, ended=("2",)), ("new", "")),
        (replace(BOTH, firing=("1", "3"), time=19, ended=()), replace(BOTH, ended=()), ("new", "")),
        (replace(ONE, ended=("2",)), replace(BOTH, ended=()), ("update", "")),
        (replace(DONE, time=5, ended=("1",)), replace(ONE, ended=("2",)), ("update", "")),
        (replace(ONE, time=29, ended=()), replace(DONE, ended=("1",)), ("nothing", OLDER)),
        (replace(ONE, ended=()), replace(BOTH, digest="x", ended=()), ("nothing", OLDER)),
        (replace(ONE, time=29, ended=()), DONE, ("nothing", OLDER)),  # of which it is not known
        (replace(ONE, ended=(), at=LATE_MS), replace(DONE, ended=("1",)), ("nothing", OLDER)),
        (replace(ONE, ended=(), at=LATE_MS + 1), replace(DONE, ended=("1",)), ("new", "")),  # fires again
        (replace(ONE, at=LATE_MS + 1), DONE, ("nothing", OLDER)),
        (replace(ONE, time=29), replace(DONE, ended=()), ("nothing", OLDER)),
        # in the order in which they came
        (replace(ONE, time=20), BOTH, ("update", "")),
        (replace(ONE, time=None), BOTH, ("update", "")),
        (ONE, replace(BOTH, time=None), ("update", "")),
        (replace(ONE, time=None), replace(DONE, time=None), ("new", "")),
    ],
)
def test_event_is_to_its_story(chapter: Chapter, last: Chapter | None, expected: tuple[str, str]) -> None:
    assert decide(chapter, last) == expected


@pytest.mark.parametrize(
    ("chapter", "last", "expected"),
    [
        (DONE, BOTH, ("update", "")),  # newer than what was said meanwhile
        (replace(BOTH, digest="x"), BOTH, ("nothing", OLDER)),
        (replace(BOTH, time=None), DONE, ("nothing", OLDER)),
        (BOTH, DONE, ("nothing", OLDER)),
        (ONE, None, ("new", "")),
    ],
)
def test_replay_that_others_overtook_needs_a_newer_time(
    chapter: Chapter, last: Chapter | None, expected: tuple[str, str]
) -> None:
    assert decide(chapter, last, overtaken=True) == expected


def test_time_far_ahead_is_not_believed() -> None:
    assert ONE.heard(0) is ONE
    assert replace(ONE, time=AHEAD_MS).heard(0).time == AHEAD_MS
    wrong = replace(ONE, time=AHEAD_MS + 1).heard(0)
    assert wrong == replace(ONE, time=None)
    assert decide(replace(DONE, time=5), wrong) == ("update", "")


chapters = st.builds(
    Chapter,
    st.sampled_from(["", "firing", "resolved"]),
    st.lists(st.text(max_size=80), max_size=5).map(tuple),
    st.none() | st.integers(0, 2**53),
    st.text(max_size=32),
    st.none() | st.lists(st.text(max_size=80), max_size=5).map(tuple),
    st.integers(0, 2**53),
)
said = st.builds(Said, chapters, st.text(max_size=20), st.integers(0))


@given(chapters)
def test_chapter_is_read_as_it_was_written(chapter: Chapter) -> None:
    written = json.loads(json.dumps(chapter.to_json()))
    read = Chapter.from_json(written)
    assert read == chapter.bounded
    assert read.to_json() == written
    assert decide(read, read)[0] == ("nothing" if chapter.digest else "update")


@given(said, st.none() | said, st.none() | st.tuples(st.text(), st.text()), st.integers(0))
def test_story_is_read_as_it_was_written(
    last: Said, before: Said | None, was: tuple[str, str] | None, events: int
) -> None:
    found = Story.from_json(Story(last, before, was, events).to_json())
    assert found.last == replace(last, chapter=last.chapter.bounded)
    assert found.before == (None if before is None else replace(before, chapter=before.chapter.bounded))
    assert (found.was, found.events) == (was, events)
    assert Story.from_json(found.to_json()) == found


def test_story_said_once_more_has_the_newer_time() -> None:
    story = Story(Said(ONE, "d", 1), events=3)
    assert story.confirmed(replace(ONE, time=50), 2).last == Said(replace(ONE, time=50), "d", 2)
    assert story.confirmed(replace(ONE, time=5), 4).events == 4
    assert story.confirmed(replace(ONE, time=5), 3).last == Said(ONE, "d", 3)
    assert story.confirmed(replace(ONE, time=None), 3).last == Said(ONE, "d", 3)
    untimed = Story(Said(replace(ONE, time=None), "d", 1), events=2)
    assert untimed.confirmed(ONE, 2).last.chapter == ONE
    assert untimed.confirmed(replace(ONE, time=None), 1) == untimed


def test_long_id_is_the_same_when_it_is_told_again() -> None:
    long = Chapter("firing", ("x" * 200,), 1, "a")
    assert decide(long, Chapter.from_json(long.to_json())) == ("nothing", SAID)
    assert decide(replace(long, digest="b"), Chapter.from_json(long.to_json())) == ("update", "")


def test_thousands_that_fire_take_bounded_room_and_news_among_them_is_told_where_it_can_be() -> None:
    many = Chapter("firing", tuple(f"id {number:06}" for number in range(5_000)), 1, "many")
    assert len(many.bounded.firing) == MAX_FIRING
    assert len(json.dumps(replace(many, firing=("x" * 10_000,)).to_json())) < 200
    last = many.bounded
    assert decide(replace(many, digest="other").bounded, last)[0] == "update"
    one_more = replace(many, firing=("id 000000a", *many.firing), digest="more").bounded
    assert decide(one_more, last)[0] == "new"
    fewer = replace(many, firing=many.firing[1:], digest="fewer").bounded  # so that one behind the last known is known
    assert decide(fewer, last)[0] == "update"


def test_id_that_no_store_takes_is_told_from_others_all_the_same() -> None:
    odd = Chapter("firing", ("\ud800", "\0", "\0" * 70, "x\n"))
    written = json.dumps(odd.to_json(), ensure_ascii=False)
    written.encode()
    assert "\\u0000" not in written
    assert len(Chapter.from_json(json.loads(written)).fires) == 4


def test_update_pings_nobody() -> None:
    content = {"msgtype": "m.text", "body": "b", "m.mentions": {"room": True}}
    assert quiet(content) == {"msgtype": "m.notice", "body": "b", "m.mentions": {}}
    assert quiet({**content, "msgtype": "m.emote"})["msgtype"] == "m.emote"


@pytest.mark.parametrize("on_update", ["edit", "thread", "reply", "new"])
def test_content_is_found_again_below_its_relations(on_update: str) -> None:
    content = {"msgtype": "m.text", "body": "b", "formatted_body": "<b>b</b>", "m.mentions": {}}
    bound = bind(content, Binding(key="k", on_update=on_update), lambda _: Found("$1")).content
    assert unbound(bound) == content


@pytest.mark.parametrize("on_update", ["edit", "thread", "reply", "new"])
def test_event_of_a_story_is_never_larger_than_it_was_checked(on_update: str) -> None:
    content = {"msgtype": "m.text", "body": "b", "m.mentions": {}}
    binding = Binding(key="k", on_update=on_update, chapter=DONE)
    told = content if on_update == "edit" else quiet(content)
    became = [quiet(content), content, bind(told, binding, lambda _: Found(LONGEST_ID)).content]
    most = len(json.dumps(largest(content, binding)))
    assert [len(json.dumps(each)) <= most for each in became] == [True] * 3


def test_binding_with_a_chapter_is_read_as_it_was_written() -> None:
    binding = Binding(key="k", on_update="reply", chapter=BOTH, bound_as="txn", number=7)
    assert Binding.from_json(binding.to_json()) == binding
    assert Binding.from_json(Binding(key="k").to_json()) == Binding(key="k")
