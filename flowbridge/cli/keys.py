"""`flowbridge keys`: API keys in the store, made, listed and revoked, also beside a running `serve`."""

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from flowbridge.cli.store import opened
from flowbridge.errors import BadRequest
from flowbridge.homeserver import identifiers
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.store import api_keys

FAILED = 1
USAGE = 2


def create(
    settings: Settings,
    name: str,
    rooms: Sequence[str],
    event_types: Sequence[str],
    users: Sequence[str] = (),
    *,
    admin: bool,
) -> int:
    """Make a key and print it, alone, on standard output; returns the exit code: 2 for scopes that can be none."""
    try:
        key = ApiKey(
            api_keys.new_id(),
            _each("--name", [name], _name)[0],
            _each("--room", rooms, _room),
            _each("--event-type", event_types, _event_type),
            admin,
            _each("--user", users, _user),
        )
    except BadRequest as error:
        return _fail(error.error, USAGE)
    secret = api_keys.new_secret()
    with opened(settings, make=True) as database, database.engine.begin() as connection:
        api_keys.add(connection, key, secret)
    print(secret, flush=True)
    _say(f"Key {key.id} is made: {_scopes(key)}. It is not shown again; callers send it as `X-API-Key`.")
    _warn_of_fixed_keys(settings)
    return 0


def show(settings: Settings) -> int:
    """Print all keys, the oldest first, without their secrets; returns the exit code."""
    with opened(settings) as database, database.engine.connect().execution_options(reads=True) as connection:
        found = api_keys.every(connection)
    rows = [("ID", "NAME", "CREATED", "LAST USED", "REVOKED", "SCOPES")]
    for entry in found:
        times = (_time(entry.created_at), _time(entry.used_at), _time(entry.revoked_at))
        rows.append((entry.key.id, entry.key.name or "-", *times, _scopes(entry.key)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    _warn_of_fixed_keys(settings)
    return 0


def revoke(settings: Settings, id_: str) -> int:
    """Revoke a key; once more does no harm. Returns the exit code: 1 when there is no such key."""
    if id_.startswith(api_keys.PREFIX):
        return _fail("this is a key, not the id of one: `flowbridge keys list` shows the ids", FAILED)
    revoked_at = None
    if id_.isprintable():
        with opened(settings) as database, database.engine.begin() as connection:
            revoked_at = api_keys.revoke(connection, id_)
    if revoked_at is None:
        return _fail(f"there is no key {id_!r}: `flowbridge keys list` shows the ids", FAILED)
    _say(f"Key {id_} is revoked since {_time(revoked_at)}. A running bridge refuses it within 2 s.")
    return 0


def _each(option: str, texts: Sequence[str], check: Callable[[str], str]) -> tuple[str, ...]:
    """What an option was given, each once. Raises BadRequest that names the option."""
    try:
        return tuple(check(text) for text in dict.fromkeys(texts))
    except BadRequest as error:
        raise BadRequest(f"{option}: {error.error}") from None
    except UnicodeError:
        raise BadRequest(f"{option}: it is not UTF-8") from None


def _name(text: str) -> str:
    return identifiers.identifier(text, "name", empty=True)


def _room(text: str) -> str:
    found = identifiers.room(_unencoded(text))
    if ",!" in found or ",#" in found or " " in found:
        raise BadRequest("it names one room: repeat it for more")
    return found


def _event_type(text: str) -> str:
    found = identifiers.event_type(_unencoded(text))
    if "," in found or " " in found:
        raise BadRequest("it names one event type: repeat it for more")
    if "*" in found[:-1]:
        raise BadRequest(f"{found!r}: a `*` stands at the end alone, as in m.room.*")
    return found


def _user(text: str) -> str:
    found = identifiers.identifier(text, "user id")
    localpart, colon, server = found[1:].partition(":")
    if found[0] != "@" or not (localpart and colon and server) or "," in found or " " in found:
        raise BadRequest(f"{found[:80]!r} is not a user id, which has the form @name:server; repeat it for more")
    return found


def _unencoded(text: str) -> str:
    """An argument is raw text, not a path segment: nothing in it is percent-decoded."""
    return text.replace("%", "%25")


def _scopes(key: ApiKey) -> str:
    scopes = [", ".join(key.rooms) or "all rooms", ", ".join(key.event_types) or "all event types"]
    scopes += ["admin"] if key.admin else []
    return "; ".join([*scopes, f"for {', '.join(key.users)}"] if key.users else scopes)


def _time(ms: int | None) -> str:
    """ISO 8601, UTC."""
    return "-" if ms is None else f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _warn_of_fixed_keys(settings: Settings) -> None:
    if settings.api_keys:
        _say("flowbridge: FLOWBRIDGE_API_KEYS is set: while it is, `serve` takes those keys and none of the store")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _fail(line: str, code: int) -> int:
    _say(f"flowbridge: {line}")
    return code
