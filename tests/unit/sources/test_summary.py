# ruff: noqa: E501 (bodies, and what is shown of them, side by side)
"""Any JSON, as a person can read it."""

import json
import time
from typing import Any

import pytest

from flowbridge.rendering.reading import text_of
from flowbridge.sources.summary import MAX_ROWS, MAX_VALUE, is_secret, summary
from tests.unit.sources.test_alerting import made


def lines(value: Any, title: str = "") -> list[str]:
    return [line for line in text_of(summary(value, title)).splitlines() if line]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"title": "Disk full", "status": "firing", "url": "https://x.example/a", "host": "db-1"},
         ["Disk full (https://x.example/a) — firing", "- host: db-1"]),
        ({"event": "deploy", "message": "v1 is out"}, ["deploy: v1 is out"]),
        ({"type": "invoice.paid", "n": 1}, ["invoice.paid", "- n: 1"]),
        ({"message": "first\nsecond\nthird"}, ["first", "second", "third"]),
        ({"a": True, "b": 1.0, "c": 1.5, "d": None, "e": "", "f": [], "g": {}},
         ["- a: yes", "- b: 1", "- c: 1.5"]),
        ({"scanStatus": "ok", "host_name": "x", "a.b/c": 1}, ["- scan status: ok", "- host name: x", "- a.b/c: 1"]),
        ({"created_at": 1700000000, "endsAt": 1700000000000, "n": 1700000000, "t": "2023-11-14T22:13:20.5+01:00"},
         ["- created at: 2023-11-14 22:13 UTC", "- ends at: 2023-11-14 22:13 UTC", "- n: 1700000000", "- t: 2023-11-14 21:13 UTC"]),
        ({"tags": ["a", "b"], "hosts": [{"name": "x", "up": True}, {"name": "y", "up": True}]},
         ["x", "- tags: a, b", "- hosts 1: up: yes", "- hosts 2: name: y · up: yes"]),
        ({"x": {"uuid": "1", "id": "2", "digest": "3"}, "a": "b"}, ["- a: b", "- x: uuid: 1 · id: 2 · digest: 3"]),
        (["a", 1, None], ["- a, 1"]),
        ("text\nlines", ["text", "lines"]),
        (None, ["An empty request."]),
        ({"html": {"a": "<b>x</b> & <script>y"}}, ["- html: a: <b>x</b> & <script>y"]),
        (1e999, ["inf"]),
        ({"n": 10**40, "f": float("nan")}, [f"- n: {10**40}", "- f: nan"]),
        ({"link": "javascript:alert(1)", "title": "T"}, ["T", "- link: javascript:alert(1)"]),
        ({"title": "T", "url": "https://"}, ["T", "- url: https://"]),
    ],
)  # fmt: skip
def test_what_it_is_about_comes_first(value: Any, expected: list[str]) -> None:
    assert lines(value) == expected


def test_title_of_the_source_stands_above() -> None:
    assert lines({"title": "T", "a": 1}, "Grafana: alert") == ["Grafana: alert", "T", "- a: 1"]


SECRETS: list[Any] = [
    *({"password": "CANARY"}, {"db_pass": "CANARY"}, {"basic_auth_pass": "CANARY"}, {"apiToken": "CANARY"}, {"x": {"client_secret": "CANARY"}}),
    *({"Authorization": "Basic CANARY"}, {"cookie": ["CANARY"]}, {"headers": {"x": "CANARY"}}, {"headers": '{"a":"CANARY"}'}),
    *({"api_key": 12345678}, {"private-key": "CANARY"}, {"credentials": [{"a": "CANARY"}]}, {"PASSPHRASE": "CANARY"}),
    *({"title": "at https://user:CANARY@x.example/"}, {"a": "postgresql://u:CANARY@h/db"}, {"url": "https://x.example/?access_token=CANARY"}),
    *({"url": "https://x.example/?a=1&key=CANARY&b=2"}, {"a": "Authorization: Bearer CANARYCANARY"}, {"a": '{"db_password": "CANARY"}'}),
    *(["https://x.example/?sig=CANARY"], "https://x.example/#token=CANARY", {"list": ["Bearer CANARYCANARY"]}),
]  # fmt: skip


@pytest.mark.parametrize("value", SECRETS)
def test_secrets_are_masked(value: Any) -> None:
    shown = summary(value)
    assert "CANARY" not in shown
    assert "12345678" not in shown
    assert "•••" in shown


@pytest.mark.parametrize(
    "name", ["passed", "passes", "passing", "passenger", "bypasses_allowed", "host", "header", "monkey"]
)
def test_what_only_sounds_like_a_secret_is_shown(name: str) -> None:
    assert not is_secret(name)


def test_rows_are_bounded() -> None:
    shown = lines({f"key {number}": number for number in range(1_000)})
    assert len(shown) == MAX_ROWS + 1
    assert shown[-1] == f"- … and {1_000 - MAX_ROWS} more"
    assert len(lines({"a": "x" * 10_000})[0]) == len("- a: ") + MAX_VALUE
    assert len(summary({f"{'k' * 1000}{n}": {"v" * 1000: "x" * 1000} for n in range(100)})) < 30_000


HUGE: dict[str, Any] = {
    "wide": {f"key {number}": number for number in range(100_000)},
    "lists": [[number] for number in range(100_000)],
    "objects": {"a": [{"b": number, "c": [{"d": number}]} for number in range(30_000)]},
    "text": {"a": "x" * 1_000_000, "b": "://" * 300_000, "c": "?key=" * 200_000, "d": '"password":"' * 80_000},
    "texts": ["x" * 8] * 100_000,
    "deep": json.loads("[" * 60 + "1" + "]" * 60),
}


@pytest.mark.parametrize("name", HUGE)
def test_time_is_linear(name: str) -> None:
    begun = time.process_time()
    assert len(summary(HUGE[name])) < 30_000
    assert time.process_time() - begun < 1  # it is 0.07 at most; the machine may be busy


@pytest.mark.parametrize("value", [{"a": "\ud800"}, {"\udfff": 1}, ["\ud83d"], {"a": "x\0y"}, {"title": "\ud800"}])
def test_half_a_character_is_shown_as_a_mark(value: Any) -> None:
    """Half of a UTF-16 pair is JSON, and no text that an event could hold."""
    (message,) = made(json.dumps(value), source="generic")["messages"]
    message["body"].encode()
    message["html"].encode()
    assert "\0" not in message["body"] + message["html"]
