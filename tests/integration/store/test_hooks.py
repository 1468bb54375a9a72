"""Hooks in the store: their secrets, states and requests, on both engines."""

import json
from typing import Any

import pytest
from sqlalchemy import Engine

from flowbridge.models.hooks import Hook, Verification
from flowbridge.store import hooks
from flowbridge.store.hooks import NewSecret, State

HOOK = Hook("ci", "!room:hs")
FULL = Hook(
    "full",
    "#room:hs",
    source="generic",
    verification=Verification("hmac", "X-Signature", "sha256=", "base64", "X-Time"),
    template={"text": "{{ payload }} ☃"},
    per="alerts",
    on_update="thread",
    mention=("@alice:hs", "@room"),
    mentions="template",
    ignore=("push",),
    keep_requests=3,
)


def token(text: str) -> NewSecret:
    return NewSecret(hooks.digest(text).hex())


@pytest.mark.parametrize("hook", [HOOK, FULL], ids=["least", "all"])
def test_hook_is_found_as_it_was_added(engine: Engine, hook: Hook) -> None:
    with engine.begin() as connection:
        assert hooks.add(connection, hook, token("a"), 5) == "added"
    with engine.begin() as connection:
        assert hooks.get(connection, hook.name) == hooks.Entry(hook, 5, 5)
        assert [entry.hook for entry in hooks.every(connection)] == [hook]
        assert hooks.get(connection, "other") is None
        assert hooks.some(connection, [hook.name, "other"]) == [hook]


def test_adding_twice_is_one_hook_for_the_same_run_and_refused_for_another(engine: Engine) -> None:
    with engine.begin() as connection:
        assert [hooks.add(connection, HOOK, token("a"), 5) for _ in range(2)] == ["added", "added"]
        assert hooks.add(connection, HOOK, token("b"), 6) == "exists"
        assert [each.hash for each in hooks.secrets(connection, 7)] == [token("a").hash]


def test_token_of_another_hook_is_taken(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.add(connection, HOOK, token("a"), 5)
        assert hooks.add(connection, FULL, token("a"), 6) == "taken"
        assert hooks.get(connection, "full") is None
        hooks.add(connection, FULL, token("b"), 7)
        assert not hooks.rotate(connection, "full", token("a"), 8, 100)
        assert not hooks.rotate(connection, "full", token("b"), 8, 100)  # nor its own once more


def test_there_are_so_many_hooks_and_no_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "MAX_HOOKS", 2)
    with engine.begin() as connection:
        found = [hooks.add(connection, Hook(name, "!r:hs"), token(name), 1) for name in "abc"]
    assert found == ["added", "added", "full"]


def test_two_newest_secrets_hold_and_the_older_one_ends(engine: Engine) -> None:
    def holding(now: int) -> list[str]:
        with engine.begin() as connection:
            return [each.hash for each in hooks.secrets(connection, now)]

    a, b, c = (token(text) for text in "abc")
    with engine.begin() as connection:
        hooks.add(connection, HOOK, a, 0)
        hooks.add(connection, FULL, token("other"), 0)
        hooks.remove(connection, "full")
        assert hooks.rotate(connection, "ci", b, 10, 100)
    assert holding(99) == [b.hash, a.hash]
    assert holding(100) == [b.hash]
    with engine.begin() as connection:
        assert hooks.rotate(connection, "ci", c, 20, 120)
        assert hooks.rotate(connection, "ci", c, 20, 120)  # the writer may run it again
    assert holding(21) == [c.hash, b.hash]
    with engine.begin() as connection:
        assert hooks.rotate(connection, "ci", token("d"), 30, 30)
    assert holding(30) == [token("d").hash]
    with engine.begin() as connection:
        assert [each.hash for each in hooks.secrets(connection, 0)] == [token("d").hash]  # the others are deleted


def test_replaced_hook_has_another_version_each_time_and_its_failure_is_over(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.add(connection, HOOK, token("a"), 50)
        hooks.note(connection, {"ci": 60}, {"ci": "broke"}, 61)
        assert hooks.state(connection, "ci") == State(60, 61, "broke")
        assert hooks.failing(connection) == {"ci": "broke"}
        seen = []
        for now in (50, 40, 90):
            assert hooks.replace(connection, Hook("ci", "!other:hs"), now) == "replaced"
            seen.append(hooks.versions(connection)["ci"])
        assert seen == [51, 52, 90]
        assert hooks.state(connection, "ci") == State(60)
        assert hooks.get(connection, "ci") == hooks.Entry(Hook("ci", "!other:hs"), 50, 90)
        assert [each.hash for each in hooks.secrets(connection, 91)] == [token("a").hash]
        assert hooks.replace(connection, FULL, 1) == "absent"


def test_replaced_hook_has_another_secret_where_it_needs_one(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.add(connection, HOOK, token("a"), 0)
        hooks.add(connection, Hook("other", "!room:hs"), token("b"), 0)
        hooks.rotate(connection, "ci", token("c"), 1, 100)
        assert hooks.replace(connection, Hook("ci", "#new:hs"), 2, token("b")) == "taken"
        assert [entry.hook.room for entry in hooks.every(connection)] == ["!room:hs", "!room:hs"]
        assert hooks.replace(connection, Hook("ci", "#new:hs"), 2, NewSecret("h", "sealed")) == "replaced"
        assert [each.hash for each in hooks.secrets(connection, 0, "ci")] == ["h"]
        assert hooks.replace(connection, FULL, 2, NewSecret("x", "sealed")) == "absent"
        assert hooks.secrets(connection, 0, "full") == []


def test_notes_of_use_and_of_failures_do_not_touch_each_other(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.note(connection, {"a": 1}, {}, 2)
        hooks.note(connection, {}, {"a": "broke"}, 3)
        hooks.note(connection, {"a": 4}, {}, 5)
        assert hooks.states(connection) == {"a": State(4, 3, "broke")}
        hooks.note(connection, {}, {"a": ""}, 6)
        assert hooks.state(connection, "a") == State(4)
        assert hooks.state(connection, "unknown") == State()
        assert hooks.failing(connection) == {}


def row(hook: str, text: str, at: int = 1) -> dict[str, Any]:
    return {"hook": hook, "received_at": at, "request": text, "outcome": "{}"}


def test_last_requests_of_each_hook_are_kept(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.keep(connection, [row("a", "1"), row("b", "x"), row("a", "2")], {"a": 2, "b": 2})
        hooks.keep(connection, [row("a", "3")], {"a": 2})
        found = hooks.requests(connection, "a")
        assert [each["request"] for each in found] == ["3", "2"]
        assert [each["request"] for each in hooks.requests(connection, "b")] == ["x"]
        assert hooks.requests(connection, "a", found[1]["id"]) == [found[1]]
        assert hooks.requests(connection, "b", found[1]["id"]) == []
        hooks.keep(connection, [], {"a": 0})
        assert hooks.requests(connection, "a") == []


def test_fewer_requests_are_kept_once_the_hook_says_so(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.add(connection, HOOK, token("a"), 0)
        hooks.keep(connection, [row("ci", str(number)) for number in range(5)], {"ci": 20})
        hooks.replace(connection, Hook("ci", "!room:hs", keep_requests=2), 1)
        assert [each["request"] for each in hooks.requests(connection, "ci")] == ["4", "3"]
        hooks.replace(connection, Hook("ci", "!room:hs", keep_requests=0), 2)
        assert hooks.requests(connection, "ci") == []


def test_removed_hook_leaves_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.add(connection, HOOK, token("a"), 0)
        hooks.rotate(connection, "ci", token("b"), 1, 100)
        hooks.note(connection, {"ci": 1}, {"ci": "broke"}, 1)
        hooks.keep(connection, [row("ci", "1")], {"ci": 20})
        assert hooks.remove(connection, "ci")
        assert not hooks.remove(connection, "ci")
        assert hooks.secrets(connection, 0) == []
        assert hooks.states(connection) == {}
        assert hooks.requests(connection, "ci") == []
        assert hooks.add(connection, HOOK, token("a"), 2) == "added"  # its token is free again


def test_new_hook_has_nothing_of_one_of_hooks_yaml_that_had_its_name(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.rotate(connection, "ci", token("old"), 1, 100)
        hooks.keep(connection, [row("ci", "1")], {"ci": 20})
        hooks.add(connection, HOOK, token("new"), 2)
        assert [each.hash for each in hooks.secrets(connection, 3)] == [token("new").hash]
        assert hooks.requests(connection, "ci") == []


def test_what_has_ended_is_purged(engine: Engine) -> None:
    with engine.begin() as connection:
        hooks.add(connection, HOOK, token("a"), 0)
        hooks.rotate(connection, "ci", token("b"), 1, 100)
        hooks.keep(connection, [row("ci", "1", 10), row("ci", "2", 20)], {"ci": 20})
        assert hooks.purge(connection, 100, 20) == 2
        assert [each.hash for each in hooks.secrets(connection, 0)] == [token("b").hash]
        assert [each["request"] for each in hooks.requests(connection, "ci")] == ["2"]


def test_definition_holds_no_secret_and_no_name() -> None:
    found = json.loads(hooks.definition(FULL))
    assert not {"name", "secret", "is_fixed"} & {*found, *found["verification"]}
