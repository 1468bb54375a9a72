"""No JSON, however far from what a tool documents, may stop a source, or lose what was sent."""

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.models.hooks import Per
from flowbridge.sources import BY_NAME
from flowbridge.sources.source import Incoming, Nothing, UnrecognisedError
from tests.unit.sources.test_alerting import HEADERS, NAMES, PAYLOADS, RECORDED, body, made

OTHERS: list[Any] = [
    *(None, True, 0, -1, 1e300, 12345678901234567890, "", "x", "\ud800", "<b>&", "0001-01-01T00:00:00Z"),
    *([], {}, [None], [[]], [{}], ["x"], {"a": None}, {"": ""}, {"id": {}}, {"a": {"b": []}}),
]
PERS: tuple[Per, ...] = ("notification", "alerts")
Path_ = tuple[str | int, ...]


def paths(value: Any, above: Path_ = ()) -> Iterator[Path_]:
    yield above
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from paths(item, (*above, key))


def replaced(value: Any, path: Path_, other: Any) -> Any:
    if not path:
        return other
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = other
    return changed


def without(value: Any, path: Path_) -> Any:
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return changed


def read(name: str, payload: Any, headers: dict[str, str]) -> None:
    """Through `read` itself, which may raise UnrecognisedError alone."""
    source = BY_NAME[name]
    assert isinstance(source.recognises(headers, payload), bool)
    assert isinstance(source.delivery_id(headers, payload), str)
    for per in PERS:
        try:
            found = source.read(Incoming(payload, headers, per))
        except UnrecognisedError:
            continue
        assert isinstance(found, Nothing) or found
        json.dumps([each.same for each in found] if not isinstance(found, Nothing) else None, sort_keys=True)


def _headers(name: str) -> dict[str, str]:
    return {key.replace("_", "-"): value for key, value in HEADERS.get(name, {}).items()}


@pytest.mark.parametrize("name", RECORDED)
def test_no_other_value_at_any_place_stops_a_source(name: str) -> None:
    payload, source = json.loads(body(name)), name.partition("/")[0]
    for path in paths(payload):
        for other in OTHERS:
            read(source, replaced(payload, path, other), _headers(name))
        if path:
            read(source, without(payload, path), _headers(name))


@pytest.mark.parametrize("name", RECORDED)
def test_what_a_mutated_body_says_can_be_shown(name: str) -> None:
    payload, source = json.loads(body(name)), name.partition("/")[0]
    for number, path in enumerate(paths(payload)):
        other = OTHERS[number % len(OTHERS)]
        found = made(json.dumps(replaced(payload, path, other)), source=source, **HEADERS.get(name, {}))
        assert "wrong" not in found, (path, other)
        assert not [each for each in found["warnings"] if "template" in each or "cannot be read" in each], (path, other)
        assert found.get("nothing") or all(each["body"] for each in found["messages"])


_KEYS = st.sampled_from(
    sorted(
        {
            str(key)
            for name in RECORDED
            for path in paths(json.loads((PAYLOADS / Path(f"{name}.json")).read_text()))
            for key in path
        }
    )
)
_HEADERS = st.dictionaries(st.sampled_from(["ce-id", "ce-specversion", "ce-time"]), st.text(max_size=9))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS | st.text(max_size=3), inner, max_size=6),
    max_leaves=25,
)


@pytest.mark.parametrize("name", NAMES)
@given(
    payload=_JSON, headers=st.dictionaries(st.sampled_from(["ce-id", "ce-specversion", "ce-time"]), st.text(max_size=9))
)
def test_no_json_stops_a_source(name: str, payload: Any, headers: dict[str, str]) -> None:
    read(name, payload, headers)


@pytest.mark.parametrize("name", NAMES)
def test_time_grows_with_the_body_not_its_square(name: str) -> None:
    """A body of a megabyte: each list of it long, each text long."""
    sample = BY_NAME[name].sample

    def grown(value: Any, times: int) -> Any:
        if isinstance(value, dict):
            return {key: grown(item, times) for key, item in value.items()}
        if isinstance(value, list):
            return [item for _ in range(times) for item in value]
        return (value + " ' value= ") * times if isinstance(value, str) and len(value) > 20 else value

    def took(times: int) -> float:
        payload = grown(sample, times)
        best = float("inf")
        for _ in range(3):
            begun = time.process_time()
            read(name, payload, {})
            best = min(best, time.process_time() - begun)
        return best

    assert took(2_000) < 40 * max(took(200), 0.001)


HOSTILE = '<del>x</del><a href="https://evil.example">y</a>&amp;'


@pytest.mark.parametrize("name", RECORDED)
def test_no_text_of_a_body_is_html(name: str) -> None:
    """Each text and each key at once, but for the words that decide what is shown."""

    def hostile(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {
                part if key == "" or part in keys else f"{part}{HOSTILE}": hostile(value[part], part) for part in value
            }
        if isinstance(value, list):
            return [hostile(item, key) for item in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) and key not in kept else value

    kept = ("status", "state", "Type", "event_type", "NewStateValue", "action", "type")
    payload = json.loads(body(name))
    keys = {key for path in paths(payload) for key in path if key not in ("instance", "environment")}
    found = made(json.dumps(hostile(payload)), source=name.partition("/")[0], **HEADERS.get(name, {}))
    assert found["warnings"] == []
    for message in found["messages"]:
        assert "<del>x</del>" in message["body"]
        assert "<del" not in message["html"]
        assert '<a href="https://evil' not in message["html"]
