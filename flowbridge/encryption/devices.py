"""The devices of the bridge, as the rest of it knows them: who encrypts for an account, and who decrypts."""

import asyncio
import json
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from flowbridge import metrics
from flowbridge.encryption.callers import CallerDevices
from flowbridge.encryption.inbound import Decrypted, Undecryptable
from flowbridge.encryption.keeper import Keeper
from flowbridge.encryption.machine import Machine
from flowbridge.encryption.olm import CryptoError
from flowbridge.encryption.setup import HINTS
from flowbridge.errors import HeldElsewhere, MatrixError, Unavailable
from flowbridge.homeserver.sync import Json, listed, section, unmarked
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once, ignore_result
from flowbridge.models import Caller, Event
from flowbridge.models.timing import Timing
from flowbridge.store import Database, crypto
from flowbridge.store.accounts import account_of

START_SECONDS = 5.0  # for which an attempt waits for a device that is being made
ENCRYPTED = "m.room.encrypted"
MAX_SHOWN = 300  # characters of a reason
MAX_LATE = 1_000  # sessions whose keys are waited for
MAX_LATE_OF_ONE = 100  # events of one of them


class Devices:
    """The bot's, and those of callers. `bot`: its user id, as far as it is known.

    `from_start`: the bot's is had at once; otherwise, unless there is one already, when an encrypted room is met: an
    account does not get a device, cross-signing keys and secret storage because a package is installed.
    """

    def __init__(
        self,
        database: Database,
        keeper: Keeper,
        callers: CallerDevices,
        bot: Callable[[], str | None],
        *,
        from_start: bool = True,
        timing: Timing = Timing(),
    ) -> None:
        self._database = database
        self._bot = bot
        self._timing = timing
        self._wanted = asyncio.Event()
        if from_start:
            self._wanted.set()
        self._making = Once[str, bytes | None]()
        self.keeper = keeper
        self.callers = callers
        keeper.on_keys = self._keys_came
        # Events that were told as undecryptable, since their keys had not come, by room and session.
        self._late: Cache[tuple[str, str], list[Json]] = Cache(MAX_LATE)
        self._telling: set[asyncio.Task[None]] = set()
        self.on_late: Callable[[str, str, Json], object] = lambda *_: None  # user, room, and the event, decrypted

    async def run(self) -> None:
        """For ever: keep the bot's device, from when it is wanted."""
        while not self._wanted.is_set():
            try:
                if await self._database.read(crypto.has_devices):
                    break
            except MatrixError:
                await asyncio.sleep(self._timing.crypto_sync_seconds)
                continue
            await self._wanted.wait()
        self._wanted.set()
        await self.keeper.run()

    @property
    def standing(self) -> str:
        """How the device stands, in a word: see `setup.Report` and `keeper.Status`."""
        status = self.keeper.status
        return status.report.standing if status.state == "held" and status.report is not None else status.state

    @property
    def missing(self) -> str:
        """What has to be done before others can rely on the device, or it can encrypt at all; "" where nothing has."""
        status = self.keeper.status
        if status.state == "held" and status.report is not None:
            return HINTS[status.report.standing]
        return status.trouble[:MAX_SHOWN] if status.state == "failed" else ""

    def measure(self) -> None:
        """Set the gauges of the metrics."""
        machine = self.keeper.machine
        metrics.device_held.set(machine is not None)
        metrics.device_sync_seconds.set(0.0 if machine is None else time.monotonic() - machine.synced_at)

    def encrypts_for(self, account: str) -> bool:
        """Raises Unavailable while it is not known who the bot is: this may be its account."""
        own = self._account()
        if not own:
            raise Unavailable("the homeserver has not said yet who the bridge's own account is")
        return own == account

    def _account(self) -> str:
        """The bot's; "" while it is not known."""
        user_id = self._bot()
        return account_of(user_id) if user_id is not None else ""

    async def device_of(self, user_id: str) -> str | None:
        """The device of a user whose keys are in the store."""
        stored = await self._database.read(partial(crypto.device, account=account_of(user_id)))
        return stored.device_id if stored is not None else None

    async def encrypt(self, account: str, event: Event, delivery: str) -> bytes | None:
        """See `delivery.encryption.Encrypts`. It goes on when its caller has no time left: the next one finds it."""
        return await self._making.get(delivery, lambda: self._encrypt(event, delivery))

    async def _encrypt(self, event: Event, delivery: str) -> bytes | None:
        if not self._wanted.is_set() and not await self.is_encrypted(event.room):
            return None
        try:
            machine = await self._machine()
        except Unavailable:
            if not await self.is_encrypted(event.room):
                return None
            raise
        await machine.fresh(self._timing.crypto_fresh_seconds)
        try:
            return await machine.encrypt(event.room, event.type, json.loads(event.content), delivery)
        except CryptoError as error:
            raise Unavailable(f"the event cannot be encrypted: {error}") from None

    async def encrypt_for(self, caller: Caller, event: Event, delivery: str) -> bytes:
        """See `delivery.encryption.Encrypts`; goes on as `encrypt` does."""
        made = await self._making.get(delivery, lambda: self.callers.encrypt(caller, event, delivery))
        assert made is not None
        return made

    async def permit(self, caller: Caller) -> None:
        await self.callers.choose(caller)

    async def made(self, delivery: str) -> bytes | None:
        found = await self._database.read(partial(crypto.ciphertext, delivery=delivery))
        return None if found is None else found.encode()

    def account_with(self, token: str | None) -> str | None:
        """Whose device has this token: syncs with it bring messages that are for the bridge."""
        if not token:
            return None
        return self._account() or None if token == self.keeper.token else self.callers.account_with(token)

    async def keep(self, token: str, sync: Any) -> None:
        """Keep what a sync with the token of a device of ours brought for it. Raises StoreUnavailable."""
        events = listed(sync, "to_device")
        if events and (account := self.account_with(token)) is not None:
            sealed = self.keeper.seal.close(events)
            await self._database.run(partial(crypto.keep_for_device, account=account, sealed=sealed))

    async def shown(self, user_id: str, room_id: str, event: Json, *, late: bool = False, fresh: bool = False) -> Json:
        """An event as its reader sees it: one that is encrypted, and the bot's to read, as it was before.

        What cannot be decrypted stays as it is, with the reason. `fresh`: its key may have come just now: look; `late`:
        and tell `on_late` when it comes later still.
        """
        event = unmarked(event)
        if event.get("type") != ENCRYPTED or user_id != self._bot() or "redacted_because" in section(event, "unsigned"):
            return event
        try:
            found = await self._decrypt(room_id, event, fresh=fresh or late)
        except Undecryptable as error:
            metrics.count(metrics.undecryptable, error.kind)
            if late and error.waits:
                self._wait(room_id, event)
            return {**event, "flowbridge": {"encrypted": True, "undecryptable": str(error)}}
        metrics.count(metrics.decrypted)
        about = {"encrypted": True, "verified": found.verified, "sender_device": found.device_id or None}
        return {**found.event, "flowbridge": about}

    def _wait(self, room_id: str, event: Json) -> None:
        place = (room_id, str(section(event, "content").get("session_id")))
        waiting = self._late.get(place) or self._late.put(place, [])
        if len(waiting) < MAX_LATE_OF_ONE:
            waiting.append(event)

    def _keys_came(self, keys: Collection[tuple[str, str]]) -> None:
        for place in keys:
            if events := self._late.pop(place):
                task = asyncio.ensure_future(self._tell(place[0], events))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)
                task.add_done_callback(ignore_result)

    async def _tell(self, room_id: str, events: list[Json]) -> None:
        user_id = self._bot() or ""
        for event in events:
            shown = await self.shown(user_id, room_id, event)
            if "undecryptable" not in shown["flowbridge"]:
                self.on_late(
                    user_id, room_id, {**shown, "flowbridge": {**shown["flowbridge"], "decrypted_later": True}}
                )

    async def _decrypt(self, room_id: str, event: Json, *, fresh: bool) -> Decrypted:
        try:
            machine = await self._machine()
            try:
                return await machine.decrypt(room_id, event)
            except Undecryptable as error:
                if not error.waits:
                    raise
            if fresh:
                await machine.fresh(0.0)
            return await machine.decrypt(room_id, event, restore=True)
        except MatrixError as error:
            raise Undecryptable(error.error, "no_device", waits=True) from None
        except Undecryptable:
            raise
        except CryptoError as error:
            raise Undecryptable(str(error), "failed") from None

    async def _machine(self) -> Machine:
        """Raises Unavailable while this process does not have the device, HeldElsewhere while another one does."""
        self._wanted.set()
        if self.keeper.machine is None:
            await self.keeper.began(START_SECONDS)
        if self.keeper.machine is None:
            owner = await self._database.read(partial(crypto.owner, account=self._account()))
            if owner not in (None, self.keeper.owner):
                raise HeldElsewhere("another process of the bridge has the device")
            raise Unavailable(f"the bridge's device is not at work: {self._trouble()}")
        return self.keeper.machine

    async def is_encrypted(self, room_id: str) -> bool:
        """Whether a room is encrypted, as far as that is known without the device; if so that is written down."""
        if await self._database.read(partial(crypto.room_settings, room_id=room_id)) is not None:
            return True
        told = await self.keeper.server.state(room_id, "m.room.encryption")
        if told is None:
            return False
        await self._database.run(partial(crypto.note_room, room_id=room_id, settings=json.dumps(told, sort_keys=True)))
        return True

    def _trouble(self) -> str:
        return self.keeper.status.trouble or "it starts"
