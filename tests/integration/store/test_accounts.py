"""Accounts: whose token is whose, and for how long it is kept."""

from typing import Any

from sqlalchemy import Connection, Engine

from flowbridge.store import accounts
from flowbridge.store.accounts import by_token, drop_idle_tokens, remember, token_hash, token_of
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


def kept(connection: Connection, name: str) -> str | None:
    """The token that is kept of an account, encrypted."""
    found = token_of(connection, name)
    assert found is not None
    return found[2]


def test_account_is_a_user_on_a_device() -> None:
    names = {
        accounts.account_of(user_id, device_id)
        for user_id, device_id in [("@a:b", "D"), ("@a:b", "E"), ("@a:b", None), ("@a:bD", ""), ("@a:b\0", "D")]
    }
    assert len(names) == 5
    assert accounts.account_of("@a:b", "D") == accounts.account_of("@a:b", "D")


def test_token_is_found_by_its_hash_and_by_its_account(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, account("alice", "one"))
        remember(connection, account("bob", "two", device_id=None))
        assert by_token(connection, "one") == ("@alice:example.org", "DEVICE")
        assert by_token(connection, "two") == ("@bob:example.org", None)
        assert by_token(connection, "encrypted one") is None
        assert token_of(connection, "bob") == ("@bob:example.org", None, "encrypted two")
        assert token_of(connection, "nobody") is None


def test_newer_token_of_an_account_takes_the_place_of_the_older(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, account("alice", "old"))
        remember(connection, account("alice", "new"))
        remember(connection, account("alice", "new", seen_at=2_000))
        assert by_token(connection, "old") is None
        assert by_token(connection, "new") == ("@alice:example.org", "DEVICE")


def test_token_belongs_to_the_account_that_had_it_last(engine: Engine) -> None:
    with engine.begin() as connection:
        remember(connection, account("alice", "one"))
        remember(connection, account("bob", "one"))
        assert by_token(connection, "one") == ("@bob:example.org", "DEVICE")
        assert token_of(connection, "alice") == ("@alice:example.org", "DEVICE", None)
        assert token_of(connection, "bob") == ("@bob:example.org", "DEVICE", "encrypted one")


def test_token_is_dropped_when_it_is_old_and_no_queued_event_needs_it(engine: Engine) -> None:
    with engine.begin() as connection:
        for name, seen_at in {"idle": 1_000, "recent": 2_000, "needed": 1_000, "done": 1_000}.items():
            remember(connection, account(name, name, seen_at=seen_at))
        put(connection, "done", lane="done|!room")
        settle(connection, claim_one(connection).fence, "done")
        put(connection, "needed", lane="needed|!room")
        assert drop_idle_tokens(connection, 2_000) == 2
        assert {name: kept(connection, name) for name in ("idle", "recent", "needed", "done")} == {
            "idle": None,
            "recent": "encrypted recent",
            "needed": "encrypted needed",
            "done": None,
        }
        assert by_token(connection, "idle") == ("@idle:example.org", "DEVICE")  # whose it is stays known
        assert drop_idle_tokens(connection, 2_000) == 0
        remember(connection, account("idle", "idle"))
        assert kept(connection, "idle") == "encrypted idle"
