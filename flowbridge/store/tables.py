"""The tables, one schema for SQLite and PostgreSQL. Times are milliseconds since 1970, UTC."""

from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Index, Integer, LargeBinary, MetaData, Table, Text, event, text

metadata = MetaData()

_Id = BigInteger().with_variant(Integer, "sqlite")


_partial: list[tuple[Index, str]] = []


def _partial_index(name: str, condition: str, *columns: Column[Any]) -> None:
    _partial.append((Index(name, *columns, sqlite_where=text(condition)), condition))


@event.listens_for(metadata, "before_create")
def _use_postgresql(_: MetaData, connection: Connection, **__: Any) -> None:
    """To name an option of PostgreSQL's dialect loads that: 2 MB, which SQLite does not need."""
    if connection.dialect.name == "postgresql":
        for index, condition in _partial:
            index.dialect_options["postgresql"]["where"] = text(condition)


outbox = Table(
    "outbox",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),  # the order of acceptance
    Column("delivery", Text, nullable=False, unique=True),  # the id that callers know
    Column("lane", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("room_id", Text, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("state_key", Text),  # NULL for a message event
    Column("content", Text, nullable=False),  # canonical JSON
    Column("request", Text),  # the body as it came, where it was not the content
    Column("txn_id", Text, nullable=False),
    Column("idem", Text, unique=True),
    Column("fingerprint", Text),
    Column("state", Text, nullable=False, server_default="queued"),  # queued | sent | dead
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("history", Text, nullable=False, server_default="[]"),  # JSON: the last attempts
    Column("event_id", Text),
    Column("error", Text),  # JSON: what a caller is told
    Column("api_key", Text),  # the id of the key that sent it
    Column("accepted_at", BigInteger, nullable=False),
    Column("settled_at", BigInteger),
    Column("caller_key", Text),  # its Idempotency-Key or txnId as it came: a person looks for that, `idem` is a hash
    Column("binding", Text),  # JSON: the relations that it is yet to get, until its turn (events/relations.py)
    sqlite_autoincrement=True,
)
_partial_index("outbox_queued", "state = 'queued'", outbox.c.lane, outbox.c.id)
_partial_index(
    "outbox_queued_states",
    "state = 'queued' AND state_key IS NOT NULL",
    *(outbox.c.lane, outbox.c.event_type, outbox.c.state_key, outbox.c.id),
)
_partial_index("outbox_settled", "settled_at IS NOT NULL", outbox.c.settled_at)
_partial_index("outbox_dead", "state = 'dead'", outbox.c.id)
# What the delivery log is filtered by, beside no content: a million rows are searched in 0.2 s. Each new entry is its
# last, which costs a send 3 µs; an entry that is sorted in by room or key would cost it 30 (SQLite, a thousand rooms).
Index(
    "outbox_log",
    *(outbox.c.id, outbox.c.room_id, outbox.c.event_type, outbox.c.account, outbox.c.api_key, outbox.c.caller_key),
)

log_blocks = Table(  # what is in a piece of the outbox: see `log_blocks.py`
    "log_blocks",
    metadata,
    Column("block", _Id, primary_key=True, autoincrement=False),
    Column("filter", LargeBinary, nullable=False),
)

refused = Table(  # sends that were answered with a 4xx, without their bodies
    "refused",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("delivery", Text, nullable=False, unique=True),
    Column("position", BigInteger, nullable=False),  # outbox.id of the newest event at that time: its place in the log
    Column("caller", Text, nullable=False),  # whose share it takes; "" for all who are not known
    Column("user_id", Text),
    Column("api_key", Text),
    Column("address", Text, nullable=False),
    Column("room_id", Text, nullable=False),  # as the call named it
    Column("event_type", Text, nullable=False),
    Column("error", Text, nullable=False),  # JSON: what the caller was told
    Column("number", BigInteger, nullable=False),  # of calls alike
    Column("refused_at", BigInteger, nullable=False),  # the first of them
    Column("last_at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("refused_callers", refused.c.caller, refused.c.id)

gone = Table(  # ids of events that were sent and whose rows are deleted: see `retention`
    "gone",
    metadata,
    Column("event_id", Text, primary_key=True),
    Column("lane", Text, nullable=False),
    Column("settled_at", BigInteger, nullable=False),
)
Index("gone_settled", gone.c.settled_at)

message_keys = Table(  # callers' names for their messages: see `message_keys.py`
    "message_keys",
    metadata,
    Column("owner", Text, primary_key=True),  # the id of an API key, or an account
    Column("room_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("delivery", Text, nullable=False),  # what the key stands for
    Column("event_id", Text),  # of the delivery, once that is deleted
    Column("used_at", BigInteger, nullable=False),
    Column("story", Text),  # JSON: what was last said of it, where a hook tells a story (events/stories.py)
)
Index("message_keys_delivery", message_keys.c.delivery)
Index("message_keys_owner", message_keys.c.owner, message_keys.c.used_at)
Index("message_keys_used", message_keys.c.used_at)

lanes = Table(
    "lanes",
    metadata,
    Column("lane", Text, primary_key=True),  # an account in a room
    Column("account", Text, nullable=False),
    Column("owner", Text),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("lease_until", BigInteger, nullable=False, server_default="0"),
    Column("dirty", Integer, nullable=False, server_default="0"),  # 1: has events that its owner may not know; or ASKED
    # The head may have been sent then, without an answer. Below 0: a backup was restored then, and all may have been.
    Column("uncertain_since", BigInteger),
    # The SHA-256 of the token that all that is in doubt was sent with; "" when that is unknown, or several ("merged":
    # leases.MERGED). Without a default: a replica of a version that does not know it can write nothing.
    Column("sent_with", Text, nullable=False),
)
_partial_index("lanes_waiting", "dirty = 1 OR owner IS NOT NULL", lanes.c.lease_until)

accounts = Table(
    "accounts",
    metadata,
    Column("account", Text, primary_key=True),  # a hash of the user id
    Column("user_id", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("token_hash", Text, primary_key=True),  # SHA-256, hexadecimal
    Column("account", Text, nullable=False),
    Column("device_id", Text),  # NULL for a token without a device
    Column("token", Text),  # encrypted; NULL once no queued event needs it
    Column("seen_at", BigInteger, nullable=False),
    Column("refused_at", BigInteger),  # the homeserver did not accept it, and has not accepted it since
)
Index("tokens_account", tokens.c.account)

resolved = Table(  # what the homeserver once said, so that accepting goes on while it is away
    "resolved",
    metadata,
    Column("name", Text, primary_key=True),  # an account's alias, or what the bot logs in as
    Column("value", Text, nullable=False),  # a room id, or a user id
    Column("seen_at", BigInteger, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),  # SHA-256, hexadecimal
    Column("rooms", Text, nullable=False),  # JSON: room ids and aliases; [] is all
    Column("event_types", Text, nullable=False),  # JSON: types, or beginnings that end in *; [] is all
    Column("admin", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Column("used_at", BigInteger),
    Column("users", Text, nullable=False, server_default="[]"),  # JSON: whose events it may replay and delete
)

hooks = Table(
    "hooks",
    metadata,
    Column("name", Text, primary_key=True),
    Column("definition", Text, nullable=False),  # JSON: models.hooks.Hook, without name and secrets
    Column("created_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
)

hook_state = Table(  # of hooks of the store and of hooks.yaml
    "hook_state",
    metadata,
    Column("name", Text, primary_key=True),
    Column("used_at", BigInteger),
    Column("failed_at", BigInteger),  # when its template failed last …
    Column("failure", Text),  # … and how
)

hook_secrets = Table(  # the two newest of a hook hold
    "hook_secrets",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("hook", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),  # SHA-256, hexadecimal
    Column("secret", Text),  # encrypted, where a signature needs it; NULL for a token
    Column("created_at", BigInteger, nullable=False),
    Column("until", BigInteger),  # NULL: for as long as there is no newer one
    sqlite_autoincrement=True,
)
Index("hook_secrets_hook", hook_secrets.c.hook, hook_secrets.c.id)

hook_requests = Table(  # the last ones of each hook, for its owner
    "hook_requests",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("hook", Text, nullable=False),
    Column("received_at", BigInteger, nullable=False),
    Column("request", Text, nullable=False),  # JSON of its headers and its body, encrypted
    Column("outcome", Text, nullable=False),  # JSON: what was done with it
    sqlite_autoincrement=True,
)
Index("hook_requests_hook", hook_requests.c.hook, hook_requests.c.id)

# End-to-end encryption (flowbridge/encryption). What is `sealed`, or a pickle, is encrypted with the secret key.

crypto_devices = Table(  # the devices of the bridge: one of an account, and one process at a time that acts as it
    "crypto_devices",
    metadata,
    Column("account", Text, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("device_id", Text, nullable=False),
    Column("pickle", Text, nullable=False),  # its own keys
    Column("sealed", Text, nullable=False),  # JSON: private keys of cross-signing, and what else is the device's own
    Column("since", Text),  # up to where its sync was read; all before it is in these tables
    Column("owner", Text),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("lease_until", BigInteger, nullable=False, server_default="0"),
    Column("asked_until", BigInteger, nullable=False, server_default="0"),  # a command asks the owner for the device
    Column("created_at", BigInteger, nullable=False),
)

crypto_sessions = Table(  # Olm: with other devices
    "crypto_sessions",
    metadata,
    Column("account", Text, primary_key=True),
    Column("peer", Text, primary_key=True),  # the other device's Curve25519 key
    Column("session_id", Text, primary_key=True),
    Column("pickle", Text, nullable=False),
    Column("used_at", BigInteger, nullable=False),  # received with, or made
)

crypto_inbox = Table(  # messages for a device that another sync with its token brought: Matrix delivers them once
    "crypto_inbox",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("account", Text, nullable=False),
    Column("sealed", Text, nullable=False),  # JSON: to-device events
    sqlite_autoincrement=True,
)
Index("crypto_inbox_account", crypto_inbox.c.account, crypto_inbox.c.id)

crypto_outbound = Table(  # Megolm: what a device encrypts with, one session of a room
    "crypto_outbound",
    metadata,
    Column("account", Text, primary_key=True),
    Column("room_id", Text, primary_key=True),
    Column("session_id", Text, nullable=False),
    Column("pickle", Text, nullable=False),
    Column("shared", Text, nullable=False),  # sealed JSON: the devices that have its key
    Column("messages", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

crypto_room_keys = Table(  # Megolm: what a device can decrypt
    "crypto_room_keys",
    metadata,
    Column("account", Text, primary_key=True),
    Column("room_id", Text, primary_key=True),
    Column("session_id", Text, primary_key=True),
    Column("peer", Text, primary_key=True),  # who shared it: a Curve25519 key; "" for one that was imported
    Column("pickle", Text, nullable=False),
    Column("sealed", Text, nullable=False),  # JSON: whose it is, and how it came
    Column("first_index", BigInteger, nullable=False),
    Column("received_at", BigInteger, nullable=False),
)

crypto_users = Table(  # the users whose devices an account follows
    "crypto_users",
    metadata,
    Column("account", Text, primary_key=True),
    Column("user_id", Text, primary_key=True),
    Column("sealed", Text),  # JSON: their devices and cross-signing keys; NULL before they were asked for
    Column("outdated", Integer, nullable=False),
)
_partial_index("crypto_users_outdated", "outdated = 1", crypto_users.c.account)

crypto_indexes = Table(  # which event each message of a Megolm session was: it is never another one
    "crypto_indexes",
    metadata,
    Column("account", Text, primary_key=True),
    Column("session_id", Text, primary_key=True),
    Column("message_index", BigInteger, primary_key=True),
    Column("mark", Text, nullable=False),  # of the event
)

crypto_logins = Table(  # devices that logged in through the bridge, and have no keys of a client's as far as is known
    "crypto_logins",
    metadata,
    Column("account", Text, primary_key=True),
    Column("device_id", Text, primary_key=True),
    Column("logged_in_at", BigInteger, nullable=False),
)

crypto_rooms = Table(  # rooms that were seen encrypted: they never cease to be
    "crypto_rooms",
    metadata,
    Column("room_id", Text, primary_key=True),
    Column("settings", Text, nullable=False),  # JSON: m.room.encryption
)

ciphertexts = Table(  # what a queued event is sent as: made once, with the step of its ratchet, before the first try
    "ciphertexts",
    metadata,
    Column("delivery", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("content", Text, nullable=False),  # of an m.room.encrypted
)
