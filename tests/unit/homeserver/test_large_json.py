"""flowbridge.homeserver.large_json"""

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.homeserver import large_json

leaves = st.none() | st.booleans() | st.integers() | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=50)


BLANK = b" " * large_json.LARGE_BYTES  # behind a text it makes it large, and means nothing


@given(values, st.sampled_from([None, 1]))
def test_what_is_read_and_written_is_what_json_makes_of_it(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert large_json.read(text.encode() + BLANK) == json.loads(text)
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for levels in range(4):
        assert large_json.write(value, levels) == compact.encode("utf-8", "replace")


BROKEN = """{ [ [1 [1, [1,] [,1] {,} {"a"} {"a":} {"a":1 {"a":1,} {1:2} {"a"_1} [1_2] []_x nul " [NaN] [1]] {"a":[1}"""


@pytest.mark.parametrize("text", ["", *(text.replace("_", " ") for text in BROKEN.split(" "))])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (json's own, and ours)
        large_json.read(text.encode() + BLANK)


def test_bytes_that_are_no_text_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        large_json.read(b'"\xff"' + BLANK)


async def test_only_large_work_leaves_the_event_loops_thread() -> None:
    here = threading.get_ident()
    assert await large_json.aside(large_json.LARGE_BYTES - 1, threading.get_ident) == here
    assert await large_json.aside(large_json.LARGE_BYTES, threading.get_ident) != here


async def test_event_loop_has_its_turn_while_a_large_text_is_read_and_written() -> None:
    room = {"timeline": {"events": [{"content": {"body": "x" * 50}, "sender": "@a:hs"}] * 500}}
    body = json.dumps({"rooms": {"join": {f"!{number}:hs": room for number in range(100)}}}).encode()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    counting = asyncio.create_task(count())
    value = await large_json.aside(len(body), large_json.read, body)
    read_turns, turns = turns, 0
    assert await large_json.aside(len(body), large_json.write, value, levels=5)
    counting.cancel()
    assert read_turns > 3
    assert turns > 3
