"""The homeserver's key API, as a device of ours uses it. Every method raises MatrixError."""

import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final
from urllib.parse import quote

from flowbridge.encryption.identities import is_id
from flowbridge.errors import Errcode, MatrixError
from flowbridge.homeserver import Homeserver, answers, large_json
from flowbridge.homeserver.client import BULK_LIMIT, READ_LIMIT, success
from flowbridge.homeserver.paths import CLIENT, room_target
from flowbridge.homeserver.sync import Json, SyncClient, section

Token = Callable[[], Awaitable[str]]

QUERY_USERS: Final = 250  # that one query names: a few devices each make some 500 kB
CLAIM_DEVICES: Final = 100
SEND_DEVICES: Final = 100  # some 400 kB of room keys
QUERY_SECONDS: Final = 30.0  # the homeserver asks others: it is told to wait for them for 10 s


class ProofNeeded(MatrixError):
    """The homeserver wants to know that the account's owner is there."""

    status = 401
    errcode = Errcode.FORBIDDEN


class KeyServer:
    """`token`: gives the device's access token, the one that is good at the time."""

    def __init__(self, homeserver: Homeserver, token: Token) -> None:
        self._homeserver = homeserver
        self._token = token
        self._sync = SyncClient(homeserver.device_poll)

    async def upload(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Device keys, one-time keys, fallback keys; returns how many one-time keys are there, by algorithm."""
        return section(await self._post("keys/upload", body), "one_time_key_counts")

    async def query(self, users: Collection[str]) -> Json:
        """The keys of at most QUERY_USERS users."""
        body = {"device_keys": {user: [] for user in sorted(users)}, "timeout": 10_000}
        return await self._post("keys/query", body, limit=BULK_LIMIT, seconds=QUERY_SECONDS)

    async def claim(self, devices: Mapping[str, Collection[str]]) -> Json:
        """A one-time key of each of these devices, by user: at most CLAIM_DEVICES."""
        wanted = {user: dict.fromkeys(sorted(names), "signed_curve25519") for user, names in devices.items()}
        body = {"one_time_keys": wanted, "timeout": 10_000}
        return section(await self._post("keys/claim", body, limit=READ_LIMIT, seconds=QUERY_SECONDS), "one_time_keys")

    async def send_to_device(self, type_: str, messages: Mapping[str, Mapping[str, Any]]) -> None:
        """Contents by user and device, at most SEND_DEVICES. After an error it may have been done all the same."""
        target = f"{CLIENT}/sendToDevice/{quote(type_, safe='')}/{secrets.token_hex(16)}"
        await self._call("PUT", target, {"messages": messages})

    async def publish_cross_signing(self, body: Mapping[str, Any], password: str = "") -> None:
        """Upload cross-signing keys. A homeserver that asks who it is is told the password.

        Synapse asks only where there are keys already. Raises ProofNeeded when it asks for what is not here.
        """
        target = f"{CLIENT}/keys/device_signing/upload"
        answer = await self._homeserver.call("POST", target, token=await self._token(), body=large_json.write(body))
        asked = answers.challenge(answer)
        if asked is not None and password and {"stages": ["m.login.password"]} in asked["flows"]:
            user_id, _ = await self._homeserver.whoami(await self._token())
            auth = {
                "type": "m.login.password",
                "identifier": {"type": "m.id.user", "user": user_id},
                "password": password,
                "session": asked.get("session"),
            }
            proved = large_json.write({**body, "auth": auth})
            answer = await self._homeserver.call("POST", target, token=await self._token(), body=proved)
        if answers.challenge(answer) is not None:
            raise ProofNeeded("the homeserver asks for the account's password, and does not take another proof")
        answers.success(answer)

    async def upload_signatures(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Signed keys by user and key id; returns those that were refused."""
        return section(await self._post("keys/signatures/upload", body), "failures")

    async def account_data(self, user_id: str, type_: str) -> Json:
        return await self._homeserver.account_data(await self._token(), user_id, type_)

    async def set_account_data(self, user_id: str, type_: str, content: Mapping[str, Any]) -> None:
        await self._homeserver.set_account_data(await self._token(), user_id, type_, content)

    async def backup_version(self) -> Json | None:
        """The account's key backup; None where there is none."""
        return await self._there(f"{CLIENT}/room_keys/version")

    async def backed_up(self, room_id: str, session_id: str, version: str) -> Json | None:
        """A room key out of a backup; None where it is not there."""
        place = f"{quote(room_id, safe='')}/{quote(session_id, safe='')}"
        return await self._there(f"{CLIENT}/room_keys/keys/{place}?version={quote(version, safe='')}")

    async def _there(self, target: str) -> Json | None:
        answer = await self._homeserver.call("GET", target, token=await self._token(), limit=READ_LIMIT)
        if answer.status == 404 and answers.error(answer).errcode == Errcode.NOT_FOUND:
            return None
        return answers.success(answer)

    async def state(self, room_id: str, type_: str) -> Json | None:
        """The content of a state event with the state key ""; None where the homeserver says that there is none."""
        answer = await self._homeserver.read_state(await self._token(), room_id, type_, "", "", any_status=True)
        if answer.status == 404 and answers.error(answer).errcode == "M_NOT_FOUND":
            return None
        return answers.success(answer)

    async def members(self, room_id: str) -> dict[str, str]:
        """The membership of all users who are, or were, in the room."""
        target = room_target(room_id, "members", {"not_membership": "leave"})
        answer = await self._homeserver.call("GET", target, token=await self._token(), limit=BULK_LIMIT)
        chunk = (await success(answer)).get("chunk")
        found: dict[str, str] = {}
        for event in chunk if isinstance(chunk, list) else []:
            user, membership = section(event).get("state_key"), section(event, "content").get("membership")
            if is_id(user) and isinstance(membership, str):
                found[user] = membership
        return found

    async def sync(self, filter_: Json, since: str, *, wait: float = 0.0) -> tuple[Json, str]:
        """An answer to a sync, and its next_batch."""
        patience = self._homeserver.deadline
        batch = await self._sync.sync(await self._token(), filter_, since=since, wait=wait, patience=patience)
        return batch.value, batch.next_batch

    async def _post(
        self, path: str, body: Mapping[str, Any], *, limit: int | None = None, seconds: float | None = None
    ) -> Json:
        return await self._call("POST", f"{CLIENT}/{path}", body, limit=limit, seconds=seconds)

    async def _call(
        self,
        method: str,
        target: str,
        body: Mapping[str, Any],
        *,
        limit: int | None = None,
        seconds: float | None = None,
    ) -> Json:
        answer = await self._homeserver.call(
            method,
            target,
            token=await self._token(),
            body=large_json.write(body),
            limit=limit or READ_LIMIT,
            deadline=seconds,
        )
        return await success(answer)
