"""Matrix paths as they are written for the homeserver. Pure.

A caller may speak `api/v1`, `r0`, `v3` or `unstable`; the homeserver is always spoken to in v3.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import quote, urlencode

_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*")  # RFC 3986: what is never encoded

CLIENT = "/_matrix/client/v3"
SYNC = f"{CLIENT}/sync"


def send_target(room_id: str, type_: str, txn_id: str) -> str:
    txn_id = txn_id if _UNRESERVED.fullmatch(txn_id) else quote(txn_id, safe="")  # no two are alike: nothing to cache
    return f"{CLIENT}/rooms/{_q(room_id)}/send/{_q(type_)}/{txn_id}"


def redact_target(room_id: str, event_id: str, txn_id: str) -> str:
    return f"{CLIENT}/rooms/{_q(room_id)}/redact/{quote(event_id, safe='')}/{quote(txn_id, safe='')}"


def state_target(room_id: str, type_: str, state_key: str) -> str:
    return f"{CLIENT}/rooms/{_q(room_id)}/state/{_q(type_)}/{_q(state_key)}"


def event_target(room_id: str, event_id: str) -> str:
    return f"{CLIENT}/rooms/{_q(room_id)}/event/{quote(event_id, safe='')}"


def room_target(room_id: str, what: str, query: Mapping[str, str]) -> str:
    """What there is to read of a room: members, joined_members, messages or state."""
    return f"{CLIENT}/rooms/{_q(room_id)}/{what}{_query(query)}"


def sync_target(query: Mapping[str, str]) -> str:
    return f"{SYNC}{_query(query)}"


def account_data_target(user_id: str, type_: str) -> str:
    return f"{CLIENT}/user/{_q(user_id)}/account_data/{_q(type_)}"


def alias_target(alias: str) -> str:
    return f"{CLIENT}/directory/room/{_q(alias)}"


def summary_target(room_or_alias: str) -> str:
    """What a room is like for one who is not in it (Matrix 1.15)."""
    return f"/_matrix/client/v1/room_summary/{_q(room_or_alias)}"


def listing_target(room_id: str) -> str:
    return f"{CLIENT}/directory/list/room/{_q(room_id)}"


def join_target(room_or_alias: str) -> str:
    return f"{CLIENT}/join/{_q(room_or_alias)}"


def member_target(room_id: str, action: str) -> str:
    """`action`: join, invite, leave, kick, ban or unban."""
    return f"{CLIENT}/rooms/{_q(room_id)}/{action}"


def _query(query: Mapping[str, str]) -> str:
    return f"?{urlencode(query, quote_via=quote)}" if query else ""


@lru_cache(4_096)
def _q(text: str) -> str:
    return text if _UNRESERVED.fullmatch(text) else quote(text, safe="")


def is_key_upload(target: str) -> bool:
    """Whether a client publishes keys for end-to-end encryption."""
    return target.partition("?")[0].rstrip("/") in _KEY_UPLOADS


_KEY_UPLOADS = frozenset(f"/_matrix/client/{version}/keys/upload" for version in ("v3", "r0", "unstable"))
