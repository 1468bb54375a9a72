"""Some seconds of the fuzzer of raw HTTP; `make chaos` has more of it."""

import asyncio
import secrets
from collections import Counter

import pytest

from tests import upstream as scripted
from tests.chaos.fuzzer import Caller, compare, converse, fuzz, talk
from tests.chaos.rooms import sum_of
from tests.http.conftest import Bridge, new_token

SECONDS = 4
CALLERS = 8


def told(request: scripted.Request) -> scripted.Behaviour | None:
    """The homeserver says what came."""
    digest = sum_of(request.body)
    if request.method == "POST":
        return scripted.answer({"sha256": digest, "content_uri": f"mxc://upstream/{digest}"})
    if request.method == "PUT":
        content = request.json()
        whole = sum_of(content["body"].encode()) == content["sum"]
        return scripted.answer({"event_id": f"${content['n']}" if whole else "$altered"})
    return None


def callers() -> list[Caller]:
    return [Caller(f"!fuzz{n}:upstream", f"Authorization: Bearer {new_token()}", str(n)) for n in range(CALLERS)]


async def test_whatever_is_sent_arrives_as_it_was_sent(
    bridge: Bridge, most: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    bridge.upstream.script(told)
    events: list[str] = []
    seed = secrets.randbelow(2**32)
    found = await fuzz(
        bridge.url,
        callers(),
        seed,
        lambda: asyncio.sleep(SECONDS),
        lambda _, n, event_id: events.append("" if event_id == f"${n}" else f"{n} is {event_id}"),
    )
    assert found.faults == [], f"seed {seed}"
    assert not any(events), f"seed {seed}"
    assert found.conversations >= CALLERS
    assert bridge.upstream.events
    assert most["at work"] == 1, f"seed {seed}"
    assert not [record.getMessage() for record in caplog.records if record.exc_info], f"seed {seed}"


async def test_fuzzer_finds_a_body_that_was_altered_and_an_answer_to_another(bridge: Bridge) -> None:
    """It can say no."""
    (caller,) = callers()[:1]
    bridge.upstream.script(told)
    number = 0
    while (
        len((said := converse(f"1:x:{number}", caller, 0)).expected) < 3
        or said.expected[-1].kind == "last"
        or said.heard < len(said.expected)
    ):
        number += 1
    answers = await talk(bridge.url, said)
    assert compare(said, answers) == []
    assert compare(said, answers[:-1])
    assert compare(said, [*answers[:-1], (500, b"{}")])
    altered = b'{"content": {"body": "t"}, "sha256": "0", "content_uri": "mxc://upstream/0"}'
    for at, one in enumerate(said.expected):
        if one.kind in ("validate", "pass", "upload", "media"):
            assert compare(said, [*answers[:at], (200, altered), *answers[at + 1 :]])
    assert converse("1:x:1", caller, 0) == converse("1:x:1", caller, 0)
