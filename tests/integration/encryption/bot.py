"""The bridge's device alone, without the bridge around it."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.encryption.callers import CallerDevices
from flowbridge.encryption.devices import Devices
from flowbridge.encryption.inbound import Decrypted
from flowbridge.encryption.keeper import Keeper, Who
from flowbridge.encryption.machine import Machine
from flowbridge.encryption.sealing import Seal
from flowbridge.homeserver import Homeserver, Locator, tls_context
from flowbridge.models import Caller, Event
from flowbridge.models.timing import Timing
from flowbridge.store import Database
from tests.patience import PATIENCE

Json = dict[str, Any]
ENCRYPTED = {"algorithm": "m.megolm.v1.aes-sha2"}
QUICK = Timing(crypto_sync_seconds=0.2, crypto_ask_seconds=0.1)


class Bot:
    """A process of the bridge that has the account's device, or waits for it."""

    def __init__(
        self,
        synapse: LocalSynapse,
        account: Account,
        url: str,
        secret: str,
        *,
        owner: str = "me",
        alone: bool = True,
        lease_seconds: float = 30.0,
        password: str = "",
        command: bool = False,
    ) -> None:
        self.account = account
        self.url = synapse.url
        self.homeserver = Homeserver(
            Locator(synapse.url, tls_context(None), allow_http=True), tls_context(None), deadline=PATIENCE
        )
        self.database = Database(url)
        self.shown: list[str] = []
        self.keeper = Keeper(
            self.database,
            self.homeserver,
            self._who,
            owner=owner,
            alone=alone,
            lease_seconds=lease_seconds,
            show=self.shown.append,
            password=password,
            command=command,
            timing=QUICK,
        )
        self.keeper.unlock(Seal(secret))

    async def _who(self) -> Caller:
        return Caller(self.account.user_id, self.account.device_id, self.account.access_token, bot=True)

    @contextlib.asynccontextmanager
    async def open(self, *, shared: bool = False) -> AsyncIterator["Bot"]:
        """With its store open, and nothing running."""
        self.database.open(shared=shared)
        self.database.start()
        try:
            yield self
        finally:
            await self.database.stop()
            self.homeserver.close()
            await asyncio.sleep(0)  # transports close in the loop's next turn

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Bot"]:
        """At work, and holding the device."""
        async with self.open():
            task = asyncio.ensure_future(self.keeper.run())
            try:
                await self.held()
                yield self
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def held(self) -> Machine:
        async with asyncio.timeout(PATIENCE):
            while self.keeper.machine is None:
                assert not task_failed(self.keeper), self.keeper.status
                await asyncio.sleep(0.02)
        return self.keeper.machine

    @property
    def machine(self) -> Machine:
        assert self.keeper.machine is not None, self.keeper.status
        return self.keeper.machine

    def devices(self) -> Devices:
        """As the rest of the bridge knows it; no caller has a device here."""

        def make(_: Who) -> Keeper:
            raise AssertionError("no caller has a device here")

        async def token_of(_: str, __: str) -> None:
            return None

        callers = CallerDevices(self.database, make, token_of, lambda user_id: user_id == self.account.user_id)
        return Devices(self.database, self.keeper, callers, lambda: self.account.user_id)

    async def room(self, *invite: str, **settings: Any) -> str:
        """A new encrypted room, which anyone may join."""
        encryption = {"type": "m.room.encryption", "state_key": "", "content": {**ENCRYPTED, **settings}}
        body = {"preset": "public_chat", "initial_state": [encryption], "invite": invite}
        return str((await self.call("POST", "createRoom", body))["room_id"])

    async def encrypt(self, room: str, body: str, delivery: str = "") -> bytes:
        await self.machine.fresh(0.0)
        content = {"msgtype": "m.text", "body": body}
        made = await self.machine.encrypt(room, "m.room.message", content, delivery or secrets.token_hex(8))
        assert made is not None
        return made

    async def send(self, room: str, body: str, delivery: str = "") -> str:
        return await self.put(room, await self.encrypt(room, body, delivery))

    async def put(self, room: str, ciphertext: bytes) -> str:
        event = Event(room, "m.room.encrypted", ciphertext, None)
        answer = await self.homeserver.send(self.account.access_token, event, secrets.token_hex(8))
        return str(json.loads(answer.body)["event_id"])

    async def event(self, room: str, event_id: str) -> Json:
        return await self.call("GET", f"rooms/{quote(room)}/event/{quote(event_id)}")

    async def read(self, room: str, event_id: str) -> Decrypted:
        """An event, decrypted, once its key has come."""
        event = await self.event(room, event_id)
        await self.machine.fresh(0.0)
        return await self.machine.decrypt(room, event)

    async def call(self, method: str, path: str, body: Any = None) -> Json:
        headers = {"Authorization": f"Bearer {self.account.access_token}"}
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"{self.url}/_matrix/client/v3/{path}"
            answer = await client.request(method, url, headers=headers, json=body)
            found: Json = answer.raise_for_status().json()
            return found


def task_failed(keeper: Keeper) -> bool:
    return keeper.status.state == "failed"


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/flowbridge.db"
