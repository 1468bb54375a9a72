"""Devices of other users, with keys that they signed themselves: who a room's key is shared with."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from flowbridge.encryption import signatures
from flowbridge.encryption.identities import ALGORITHMS
from flowbridge.encryption.olm import Account

if TYPE_CHECKING:
    from flowbridge.cli.demo.synapse import LocalSynapse

ONE_TIME_KEYS = 5  # of each; a bridge uses one
AT_ONCE = 4  # requests, while they are made

Json = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A user, as one of its devices."""

    user_id: str
    token: str


class Keys:
    """The keys of a new device; nobody reads what is sent to it."""

    def __init__(self, user_id: str, device_id: str) -> None:
        self.user_id = user_id
        self.device_id = device_id
        self._account = Account()
        self._account.generate_one_time_keys(ONE_TIME_KEYS)

    def _signed(self, value: Json) -> Json:
        signature = self._account.sign(signatures.signed_part(value))
        return signatures.add(value, self.user_id, self.device_id, signature)

    @property
    def published(self) -> Json:
        name, account = self.device_id, self._account
        return self._signed(
            {
                "user_id": self.user_id,
                "device_id": name,
                "algorithms": ALGORITHMS,
                "keys": {f"curve25519:{name}": account.curve25519, f"ed25519:{name}": account.ed25519},
            }
        )

    @property
    def one_time(self) -> Json:
        found = self._account.one_time_keys
        return {f"signed_curve25519:{name}": self._signed({"key": key}) for name, key in found.items()}


def register(homeserver: "LocalSynapse", names: Iterable[str], devices: int) -> list[Member]:
    """Users with so many devices each, on a real homeserver."""
    with ThreadPoolExecutor(AT_ONCE) as threads, httpx.Client(trust_env=False, timeout=120) as client:
        return list(threads.map(lambda name: _user(homeserver, client, name, devices), names))


def _user(homeserver: "LocalSynapse", client: httpx.Client, name: str, devices: int) -> Member:
    first = homeserver.register(name)
    logins = [(first.device_id, first.access_token)]
    for _ in range(devices - 1):
        identifier = {"type": "m.id.user", "user": name}
        body = {"type": "m.login.password", "identifier": identifier, "password": first.password}
        login = client.post(f"{homeserver.url}/_matrix/client/v3/login", json=body).raise_for_status().json()
        logins.append((login["device_id"], login["access_token"]))
    for device_id, token in logins:
        keys = Keys(first.user_id, device_id)
        upload = {"device_keys": keys.published, "one_time_keys": keys.one_time}
        ask(client, homeserver.url, token, "POST", "keys/upload", upload)
    return Member(first.user_id, first.access_token)


def join(homeserver: "LocalSynapse", room: str, members: Iterable[Member]) -> None:
    with httpx.Client(trust_env=False, timeout=120) as client:
        for member in members:
            ask(client, homeserver.url, member.token, "POST", f"join/{quote(room, safe='')}", {})


def ask(client: httpx.Client, url: str, token: str, method: str, path: str, body: Json) -> Json:
    headers = {"Authorization": f"Bearer {token}"}
    answer = client.request(method, f"{url}/_matrix/client/v3/{path}", headers=headers, json=body)
    found: Json = answer.raise_for_status().json()
    return found
