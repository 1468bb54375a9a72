"""Devices of callers with tokens of their own: made for those that logged in through the bridge, at their first event
for an encrypted room.

A token whose device has a client's keys is that client's: the bridge never encrypts with it. Such a device is held for
a while and synced when it is to encrypt; the bridge does not sign it, since that is up to the account's owner.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from flowbridge import log
from flowbridge.encryption import setup
from flowbridge.encryption.keeper import Keeper, Who
from flowbridge.encryption.machine import Machine
from flowbridge.encryption.olm import CryptoError
from flowbridge.encryption.own_device import LeaseLost
from flowbridge.errors import Forbidden, HeldElsewhere, MatrixError, Unavailable
from flowbridge.models import Caller, Event
from flowbridge.models.timing import Timing
from flowbridge.store import Database, clock, crypto
from flowbridge.store.accounts import account_of

MAX_HELD = 100  # devices at a time: some 300 kB each
IDLE_SECONDS = 120.0  # after which one is given back
MAKE_SECONDS = 10.0  # for which an attempt waits for a device that is being made, or read

HOW = (
    "the room is encrypted, and the bridge has no keys for this token's device: send with an API key, log in by "
    "`POST /login` of the bridge and use that token for the bridge alone, or use a client that encrypts itself"
)

UNSIGNED = (
    "clients that trust signed devices only do not read it: its owner may verify this session from another client"
)

TokenOf = Callable[[str, str], Awaitable[str | None]]  # account and device → a token of it that may be good


@dataclass(eq=False, slots=True)
class _Held:
    """A device at work. `users`: events that are being encrypted with it."""

    caller: Caller
    ready: "asyncio.Future[Machine]"
    task: "asyncio.Task[None] | None" = None
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class CallerDevices:
    """`make`: a keeper of the device of whom it is told. `is_bot`: of a user; the bot's device is not a caller's.

    For one event loop.
    """

    def __init__(
        self,
        database: Database,
        make: Callable[[Who], Keeper],
        token_of: TokenOf,
        is_bot: Callable[[str], bool],
        *,
        timing: Timing = Timing(),
    ) -> None:
        self._database = database
        self._is_bot = is_bot
        self._make = make
        self._token_of = token_of
        self._timing = timing
        self._held: dict[str, _Held] = {}

    # who may

    async def logged_in(self, user_id: str, device_id: str) -> None:
        """A login through the bridge has succeeded. Raises StoreUnavailable."""
        work = partial(crypto.note_login, account=account_of(user_id), device_id=device_id, now=clock.now_ms())
        await self._database.run(work)

    async def forget(self, user_id: str, device_id: str) -> None:
        """A device has logged out, or a client gives it keys. Raises StoreUnavailable.

        The bot keeps its identity and its room keys: its next device has them.
        """
        if self._is_bot(user_id):
            return
        account = account_of(user_id)
        held = self._held.get(account)
        if held is not None and held.caller.device_id == device_id:
            held.ended.set()
        await self._database.run(partial(crypto.forget_device, account=account, device_id=device_id))

    async def forget_user(self, user_id: str) -> None:
        """All devices of a user have logged out. Raises StoreUnavailable."""
        stored = await self._database.read(partial(crypto.device, account=account_of(user_id)))
        if stored is not None:
            await self.forget(user_id, stored.device_id)

    async def choose(self, caller: Caller) -> Caller:
        """The caller with the device of its account that the bridge uses: the one that it has, or else its own.

        Raises Forbidden, which says what to do, and StoreUnavailable.
        """
        account = account_of(caller.user_id)
        stored = await self._database.read(partial(crypto.device, account=account))
        if stored is not None:
            if stored.device_id == caller.device_id:
                return caller
            if token := await self._token_of(account, stored.device_id):
                return Caller(caller.user_id, stored.device_id, token)
        own = caller.device_id
        if own is None or not await self._database.read(partial(crypto.is_login, account=account, device_id=own)):
            raise Forbidden(HOW)
        return caller

    def account_with(self, token: str) -> str | None:
        """The account of the device at work that has this token."""
        return next((account for account, held in self._held.items() if held.caller.token == token), None)

    # encrypting

    async def encrypt(self, caller: Caller, event: Event, delivery: str) -> bytes:
        """See `delivery.encryption.Encrypts`."""
        chosen = await self.choose(caller)
        try:
            async with self._machine(account_of(caller.user_id), chosen) as machine:
                await machine.fresh(self._timing.crypto_fresh_seconds)
                made = await machine.encrypt(event.room, event.type, json.loads(event.content), delivery)
        except LeaseLost:
            raise HeldElsewhere("another process of the bridge has the caller's device") from None
        except setup.DeviceTaken:
            await self.forget(chosen.user_id, chosen.device_id or "")
            raise Forbidden(HOW) from None
        except CryptoError as error:
            raise Unavailable(f"the event cannot be encrypted: {error}") from None
        if made is None:  # the homeserver said so a moment ago
            raise Unavailable("whether the room is encrypted is not clear")
        return made

    @contextlib.asynccontextmanager
    async def _machine(self, account: str, caller: Caller) -> AsyncIterator[Machine]:
        """The device at work, for as long as it is used."""
        while held := self._held.get(account):  # another event may have begun to hold it while this one waited
            if not held.ended.is_set() and held.caller.device_id == caller.device_id:
                break
            await self._end(account, held)
        held = held or self._hold(account, caller)
        held.caller = caller  # the device may have a new token
        held.users += 1
        try:
            async with asyncio.timeout(MAKE_SECONDS):
                machine = await asyncio.shield(held.ready)
            yield machine
        except TimeoutError:
            raise Unavailable("the caller's device is being made: it takes long") from None
        finally:
            held.users -= 1
            held.used_at = time.monotonic()

    def _hold(self, account: str, caller: Caller) -> _Held:
        """Begin to hold a device, perhaps in the place of one that is not used. Raises Unavailable."""
        if len(self._held) >= MAX_HELD:
            idle = [(each.used_at, name) for name, each in self._held.items() if not each.users]
            if not idle:
                raise Unavailable(f"{MAX_HELD} callers send to encrypted rooms already: try again in a moment")
            self._held.pop(min(idle)[1]).ended.set()
        held = _Held(caller, asyncio.get_running_loop().create_future())
        held.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # perhaps nobody waits
        self._held[account] = held
        held.task = asyncio.create_task(self._attend(account, held))
        return held

    async def _attend(self, account: str, held: _Held) -> None:
        """Hold a device until it is not used for long, or lost."""

        async def who() -> Caller:
            return held.caller

        try:
            async with self._make(who).holding() as machine:
                await self._check(machine)
                await machine.fresh(0.0)
                held.ready.set_result(machine)
                device = machine.device
                log.info("device_held", user=device.user_id, device=device.device_id)
                while not device.is_lost and not held.ended.is_set():
                    if not held.users and time.monotonic() > held.used_at + IDLE_SECONDS:
                        break
                    ending = [asyncio.ensure_future(event.wait()) for event in (device.lost, held.ended)]
                    await asyncio.wait(ending, timeout=IDLE_SECONDS / 4, return_when=asyncio.FIRST_COMPLETED)
                    for each in ending:
                        each.cancel()
        except Exception as error:
            if not held.ready.done():
                held.ready.set_exception(error)
            if not isinstance(error, MatrixError | CryptoError):
                log.error("device_failed", exc_info=error)
        finally:
            held.ended.set()
            if not held.ready.done():
                held.ready.set_exception(LeaseLost())
            if self._held.get(account) is held:
                del self._held[account]

    async def _check(self, machine: Machine) -> None:
        """Raise DeviceTaken when the homeserver has other keys under the device's id: a client has given it some."""
        report = await setup.report(machine.device, machine.server)
        if report.standing == "absent":
            keys = await setup.own_keys(machine.server, machine.device.user_id)
            if machine.device.device_id in keys.devices:
                raise setup.DeviceTaken(HOW)
            await machine.publish()
        if report.standing in ("unsigned", "foreign"):
            log.info("device_unsigned", user=report.user_id, device=report.device_id, hint=UNSIGNED)

    async def _end(self, account: str, held: _Held) -> None:
        held.ended.set()
        if self._held.get(account) is held:
            del self._held[account]
        if held.task is not None:
            await asyncio.wait([held.task])

    async def stop(self) -> None:
        """Give all devices back."""
        tasks = [held.task for held in self._held.values() if held.task is not None]
        for held in self._held.values():
            held.ended.set()
        await asyncio.gather(*tasks, return_exceptions=True)
