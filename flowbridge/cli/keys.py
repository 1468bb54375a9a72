"""`flowbridge keys`: create, list and revoke API keys in the store, also beside a running `serve`."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from flowbridge.cli import FAILED, UNUSABLE
from flowbridge.cli.store import opened
from flowbridge.cli.terminal import note, say
from flowbridge.errors import BadRequest
from flowbridge.homeserver import identifiers
from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.store import api_keys
from flowbridge.store.engine import place


def create(
    settings: Settings,
    name: str,
    rooms: Sequence[str],
    event_types: Sequence[str],
    users: Sequence[str] = (),
    *,
    admin: bool,
    timing: Timing = Timing(),
) -> int:
    """Create a key and print it, alone, on standard output; returns the exit code: 2 for scopes that are not valid."""
    try:
        key = ApiKey(
            api_keys.new_id(),
            _each("--name", [name], _name)[0],
            _each("--room", rooms, room_scope),
            _each("--event-type", event_types, event_type_scope),
            admin,
            _each("--user", users, _user),
        )
    except BadRequest as error:
        return _fail(error.error, UNUSABLE)
    secret = api_keys.new_secret()
    with opened(settings, tells=True, timing=timing) as database, database.engine.begin() as connection:
        api_keys.add(connection, key, secret)
    print(secret, flush=True)
    note(f"Key {key.id} is made: {describe(key)}. It is not shown again; callers send it as `X-API-Key`.")
    _warn_of_fixed_keys(settings)
    return 0


def show(settings: Settings) -> int:
    """Print all keys, the oldest first, without their secrets; returns the exit code."""
    with opened(settings, tells=True) as database, database.reading() as connection:
        found = api_keys.every(connection)
    rows = [("ID", "NAME", "CREATED", "LAST USED", "REVOKED", "SCOPES")]
    for entry in found:
        times = (moment(entry.created_at), moment(entry.used_at), moment(entry.revoked_at))
        rows.append((entry.key.id, entry.key.name or "-", *times, describe(entry.key)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    _warn_of_fixed_keys(settings)
    return 0


def revoke(settings: Settings, id_: str, *, timing: Timing = Timing()) -> int:
    """Revoke a key, which may be repeated. Returns the exit code: 1 when there is no such key."""
    if id_.startswith(api_keys.PREFIX):
        return _fail("this is a key, not the id of one: `flowbridge keys list` shows the ids", FAILED)
    revoked_at, where = None, ""
    if id_.isprintable():
        with opened(settings, timing=timing) as database, database.engine.begin() as connection:
            revoked_at = api_keys.revoke(connection, id_)
            where = f" in {place(database.url)}"
    if revoked_at is None:
        return _fail(f"there is no key {id_!r}{where}: `flowbridge keys list` shows the ids", FAILED)
    note(f"Key {id_}{where} is revoked since {moment(revoked_at)}. A running bridge refuses it within 2 s.")
    return 0


def _each(option: str, texts: Sequence[str], check: Callable[[str], str]) -> tuple[str, ...]:
    """The values of an option, without repetitions. Raises BadRequest that names the option."""
    try:
        return tuple(check(text) for text in dict.fromkeys(texts))
    except BadRequest as error:
        raise BadRequest(f"{option}: {error.error}") from None
    except UnicodeError:
        raise BadRequest(f"{option}: it is not UTF-8") from None


def _name(text: str) -> str:
    return identifiers.identifier(text, "name", empty=True)


def room_scope(text: str) -> str:
    found = identifiers.room(_unencoded(text))
    if ",!" in found or ",#" in found or " " in found:
        raise BadRequest("it names one room: repeat it for more")
    return found


def event_type_scope(text: str) -> str:
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


def describe(key: ApiKey) -> str:
    scopes = [", ".join(key.rooms) or "all rooms", ", ".join(key.event_types) or "all event types"]
    scopes += ["admin"] if key.admin else []
    return "; ".join([*scopes, f"for {', '.join(key.users)}"] if key.users else scopes)


def moment(ms: int | None) -> str:
    """ISO 8601, UTC."""
    return "-" if ms is None else f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _warn_of_fixed_keys(settings: Settings) -> None:
    if settings.api_keys:
        say("FLOWBRIDGE_API_KEYS is set: while it is, `serve` takes those keys and none of the store")


def _fail(line: str, code: int) -> int:
    say(line)
    return code
