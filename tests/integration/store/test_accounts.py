"""Accounts: whose token is whose, and for how long it is kept."""

from typing import Any

from sqlalchemy import Connection, Engine

from flowbridge.store import accounts
from flowbridge.store.accounts import (
    by_token,
    drop_idle_tokens,
    forget_tokens,
    queued,
    remember,
    token_hash,
    tokens_of,
    write,
)
from tests.integration.store.events import claim_one, put, settle


def account(name: str, token: str, **values: Any) -> dict[str, Any]:
    return {
        "account": name,
        "user_id": f"@{name}:example.org",
        "device_id": "DEVICE",
        "token": f"encrypted {token}",
        "token_hash": token_hash(token),
        "seen_at": 1_000,
        **values,
    }


def kept(connection: Connection, name: str) -> list[str]:
    """The tokens that are kept of an account, encrypted, the one seen last first."""
    return [found.token for found in tokens_of(connection, name)]


def test_account_is_a_user() -> None:
    assert len({accounts.account_of(user_id) for user_id in ("@a:b", "@a:bD", "@a:b\0", "@A:b")}) == 4
    assert accounts.account_of("@a:b") == accounts.account_of("@a:b")


def test_token_is_found_by_its_hash_and_by_its_account(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, account("alice", "one"))
        remember(connection, account("bob", "two", device_id=None))
        assert by_token(connection, "one") == ("@alice:example.org", "DEVICE")
        assert by_token(connection, "two") == ("@bob:example.org", None)
        assert by_token(connection, "encrypted one") is None
        assert tokens_of(connection, "bob") == [("@bob:example.org", None, "encrypted two")]
        assert tokens_of(connection, "nobody") == []


def test_newer_token_of_a_device_takes_the_place_of_the_older(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, account("alice", "old"))
        remember(connection, account("alice", "new"))
        remember(connection, account("alice", "new", seen_at=2_000))
        assert by_token(connection, "old") is None
        assert by_token(connection, "new") == ("@alice:example.org", "DEVICE")
        assert kept(connection, "alice") == ["encrypted new"]


def test_account_has_a_token_for_each_device_the_one_seen_last_first(engine: Engine) -> None:
    with engine.begin() as connection:
        for device_id, seen_at in [("PHONE", 2_000), ("DESK", 3_000), (None, 1_000)]:
            remember(connection, account("alice", f"of {device_id}", device_id=device_id, seen_at=seen_at))
        assert kept(connection, "alice") == ["encrypted of DESK", "encrypted of PHONE", "encrypted of None"]
        remember(connection, account("alice", "of PHONE", device_id="PHONE", seen_at=4_000))
        assert kept(connection, "alice") == ["encrypted of PHONE", "encrypted of DESK", "encrypted of None"]


def test_token_belongs_to_the_account_that_had_it_last(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, account("alice", "one"))
        remember(connection, account("bob", "one"))
        assert by_token(connection, "one") == ("@bob:example.org", "DEVICE")
        assert tokens_of(connection, "alice") == []
        assert tokens_of(connection, "bob") == [("@bob:example.org", "DEVICE", "encrypted one")]


def test_token_is_dropped_when_it_is_old_and_no_queued_event_needs_it(engine: Engine) -> None:
    with engine.begin() as connection:
        for name, seen_at in {"idle": 1_000, "recent": 2_000, "needed": 1_000, "done": 1_000}.items():
            remember(connection, account(name, name, seen_at=seen_at))
        put(connection, "done", lane="done|!room")
        settle(connection, claim_one(connection).fence, "done")
        put(connection, "needed", lane="needed|!room")
        assert drop_idle_tokens(connection, 2_000) == 2
        assert {name: kept(connection, name) for name in ("idle", "recent", "needed", "done")} == {
            "idle": [],
            "recent": ["encrypted recent"],
            "needed": ["encrypted needed"],
            "done": [],
        }
        assert by_token(connection, "idle") == ("@idle:example.org", "DEVICE")  # whose it is stays known
        assert drop_idle_tokens(connection, 2_000) == 0
        remember(connection, account("idle", "idle"))
        assert kept(connection, "idle") == ["encrypted idle"]


def test_refused_token_is_not_used_until_it_is_seen_again(engine: Engine) -> None:
    with engine.begin() as connection:
        for device_id in ("PHONE", "DESK"):
            remember(connection, account("alice", device_id, device_id=device_id))
        write(connection, {"account": "alice", "token_hash": token_hash("PHONE"), "refused_at": 5_000})
        assert kept(connection, "alice") == ["encrypted DESK"]
        assert by_token(connection, "PHONE") is None
        assert [found.token for found in tokens_of(connection, "alice", refused=True)] == ["encrypted PHONE"]
        write(connection, account("alice", "PHONE", device_id="PHONE"))
        assert sorted(kept(connection, "alice")) == ["encrypted DESK", "encrypted PHONE"]


def test_all_tokens_of_an_account_are_refused_at_once_and_no_others(engine: Engine) -> None:
    with engine.begin() as connection:
        for name, token in [("alice", "one"), ("bob", "two")]:
            remember(connection, account(name, token))
        write(connection, {"account": "alice", "refused_at": 5_000})
        assert (kept(connection, "alice"), kept(connection, "bob")) == ([], ["encrypted two"])


def test_account_without_a_token_is_known_by_its_user(engine: Engine) -> None:
    with engine.begin() as connection:
        write(connection, {"account": "alice", "user_id": "@alice:example.org"})
        put(connection, "a", "b", lane="alice|!room")
        put(connection, "c", lane="stranger|!room")
        assert queued(connection) == [("alice", "@alice:example.org", 2), ("stranger", None, 1)]
        assert kept(connection, "alice") == []


def test_blank_token_is_forgotten_when_it_has_not_been_seen_for_long(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, {**account("alice", "blank", device_id="PHONE"), "token": None})
        remember(connection, account("alice", "kept", device_id="DESK"))
        assert forget_tokens(connection, 1_000) == 0
        assert forget_tokens(connection, 1_001) == 1
        assert by_token(connection, "blank") is None
        assert kept(connection, "alice") == ["encrypted kept"]
