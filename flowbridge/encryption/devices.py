"""The devices of the bridge, as the rest of it knows them: who encrypts for an account, and who decrypts."""

import asyncio
import json
from collections.abc import Callable
from functools import partial

from flowbridge.encryption.inbound import Decrypted, Undecryptable
from flowbridge.encryption.keeper import Keeper
from flowbridge.encryption.machine import Machine
from flowbridge.encryption.olm import CryptoError
from flowbridge.errors import MatrixError, Unavailable
from flowbridge.homeserver.sync import Json
from flowbridge.limits.tasks import Once
from flowbridge.models import Event
from flowbridge.models.timing import Timing
from flowbridge.store import Database, crypto
from flowbridge.store.accounts import account_of

START_SECONDS = 5.0  # for which an attempt waits for a device that is being made
KEY_PAUSES = (0.0, 0.5, 1.0, 2.0, None)  # before a look for a key that is late, in turn


class Devices:
    """So far the bot's alone. `bot`: its user id, as far as it is known."""

    def __init__(
        self, database: Database, keeper: Keeper, bot: Callable[[], str | None], *, timing: Timing = Timing()
    ) -> None:
        self._database = database
        self._bot = bot
        self._timing = timing
        self._making = Once[str, bytes | None]()
        self.keeper = keeper

    def encrypts_for(self, account: str) -> bool:
        """Raises Unavailable while it is not known who the bot is: this may be its account."""
        user_id = self._bot()
        if user_id is None:
            raise Unavailable("the homeserver has not said yet who the bridge's own account is")
        return account_of(user_id) == account

    async def encrypt(self, account: str, event: Event, delivery: str) -> bytes | None:
        """See `delivery.encryption.Encrypts`. It goes on when its caller has no time left: the next one finds it."""
        return await self._making.get(delivery, lambda: self._encrypt(event, delivery))

    async def _encrypt(self, event: Event, delivery: str) -> bytes | None:
        machine = await self._machine()
        await machine.fresh(self._timing.crypto_fresh_seconds)
        try:
            return await machine.encrypt(event.room, event.type, json.loads(event.content), delivery)
        except CryptoError as error:
            raise Unavailable(f"the event cannot be encrypted: {error}") from None

    async def made(self, delivery: str) -> bytes | None:
        found = await self._database.read(partial(crypto.ciphertext, delivery=delivery))
        return None if found is None else found.encode()

    async def decrypt(self, room_id: str, event: Json) -> Decrypted:
        """An event of a room of the bot's. A key that is on its way is waited for.

        Raises Undecryptable, also when the device is not at work.
        """
        try:
            machine = await self._machine()
            for pause in KEY_PAUSES:
                try:
                    return await machine.decrypt(room_id, event)
                except Undecryptable as error:
                    if not error.waits or pause is None:
                        raise
                await asyncio.sleep(pause)
                await machine.fresh(0.0)
        except MatrixError as error:
            raise Undecryptable(f"the bridge's device is not at work: {error.error}", waits=True) from None
        raise AssertionError("the last pause is None")

    async def _machine(self) -> Machine:
        """Raises Unavailable while this process does not have the device."""
        if self.keeper.machine is None:
            await self.keeper.began(START_SECONDS)
        if self.keeper.machine is None:
            raise Unavailable(f"the room is encrypted, and the bridge's device is not at work: {self._trouble()}")
        return self.keeper.machine

    def _trouble(self) -> str:
        return self.keeper.status.trouble or "it starts"
