"""Keeping a device: made when there is none, held under its lease, synced, and made the account's own.

Of several replicas one holds it; the others wait for its lease to end. A command that has to act as the device asks for
it, and gets it for a while.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flowbridge import log
from flowbridge.encryption import setup
from flowbridge.encryption.key_server import KeyServer, ProofNeeded
from flowbridge.encryption.machine import Machine
from flowbridge.encryption.olm import CryptoError
from flowbridge.encryption.own_device import LeaseLost, OwnDevice
from flowbridge.encryption.sealing import Seal
from flowbridge.encryption.setup import Report, ShowKey
from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.limits.tasks import ignore_result
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.store import Database, clock, crypto
from flowbridge.store.accounts import account_of
from flowbridge.store.crypto import DeviceLease, StoredDevice

Who = Callable[[], Awaitable[Caller | None]]  # the account, with a token that is good; raises MatrixError

SYNC_SHARE = 20  # the next sync waits for so many times what the last took
LENT_MS = 600_000  # for which a command may have the device
LENT_SECONDS = 10.0  # for a bridge that runs to give it back
MAX_PAUSE = 30.0  # between two syncs, and between two attempts to have the device

State = Literal["off", "starting", "held", "elsewhere", "failed"]


@dataclass(frozen=True, slots=True)
class Status:
    """`trouble`: why nothing can be encrypted, or why others may not rely on the device; what to do about it.

    elsewhere: another process holds the device.
    """

    state: State
    trouble: str = ""
    report: Report | None = None


class Keeper:
    """The device of one account. `owner`: this process; `alone`: no other has the store at its start.

    `password`: proves to the homeserver that the account may have cross-signing keys. `show`: see `recovery_file`.
    `command`: it has asked for the device, which the bridge then lends. `verify_users`: see `Verifications.users`.
    """

    def __init__(
        self,
        database: Database,
        homeserver: Homeserver,
        who: Who,
        *,
        owner: str,
        alone: bool,
        lease_seconds: float,
        show: ShowKey,
        password: str = "",
        command: bool = False,
        verify_users: Collection[str] = (),
        timing: Timing = Timing(),
    ) -> None:
        self._database = database
        self._who = who
        self.owner = owner
        self._alone = alone
        self._lease_ms = int(lease_seconds * 1000)
        self._password = password
        self._show = show
        self._is_command = command
        self._verify_users = frozenset(verify_users)
        self._timing = timing
        self.seal: Seal
        self.token = ""  # with which the account was last known
        self.server = KeyServer(homeserver, self._token)
        self.machine: Machine | None = None  # while the device is held
        self.status = Status("off")
        self.on_rooms: Callable[[Collection[str]], object] = lambda _: None  # see Machine
        self.on_keys: Callable[[Collection[tuple[str, str]]], object] = lambda _: None  # likewise
        self._began = asyncio.Event()

    def unlock(self, seal: Seal) -> None:
        self.seal = seal

    async def _token(self) -> str:
        caller = await self._who()
        self.token = caller.token if caller else ""
        return self.token

    # the device

    async def run(self) -> None:
        """For ever: have the device, keep it, and have it again."""
        pause = self._timing.crypto_sync_seconds
        while True:
            if self.status.state == "off":
                self.status = Status("starting")
            try:
                async with self.holding() as machine:
                    pause = self._timing.crypto_sync_seconds
                    await self._keep(machine)
            except LeaseLost:
                self._failed("elsewhere", "another process of the bridge holds the device")
            except (MatrixError, CryptoError) as error:
                self._failed("failed", str(error))
                pause = min(MAX_PAUSE, 2 * pause)
            except Exception as error:  # a fault here must not end encryption until the next start
                log.error("device_failed", exc_info=error)
                self._failed("failed", "flowbridge made a mistake; its log says which")
                pause = MAX_PAUSE
            self._began.set()
            await asyncio.sleep(pause)

    @contextlib.asynccontextmanager
    async def holding(self) -> AsyncIterator[Machine]:
        """The device at work; it is given back in the end. Raises LeaseLost, CryptoError, MatrixError."""
        caller = await self._who()
        if caller is None:
            raise CryptoError("there is no account that the device could be of")
        stored, lease = await self._claim(caller, self.seal)
        device = OwnDevice(self._database, self.seal, lease, stored)
        renewing = asyncio.ensure_future(self._renew(device))
        renewing.add_done_callback(ignore_result)
        try:
            machine = Machine(device, self.server, lambda rooms: self.on_rooms(rooms), lambda keys: self.on_keys(keys))
            machine.verifications.users = self._verify_users
            await machine.begin()
            yield machine
        finally:
            self.machine = None
            device.lost.set()
            renewing.cancel()
            with contextlib.suppress(MatrixError):
                await self._database.run(partial(crypto.release, lease=lease))

    @contextlib.asynccontextmanager
    async def borrowing(self) -> AsyncIterator[Machine]:
        """The device for a command, perhaps out of the hands of a bridge that runs. Raises as `holding`."""
        caller = await self._who()
        account = account_of(caller.user_id) if caller else ""
        await self._database.run(partial(crypto.ask, account=account, for_ms=LENT_MS))
        deadline = time.monotonic() + max(LENT_SECONDS, self._lease_ms / 1000)
        try:
            async with contextlib.AsyncExitStack() as stack:
                while True:
                    try:
                        machine = await stack.enter_async_context(self.holding())
                        break
                    except LeaseLost:
                        if time.monotonic() > deadline:
                            raise
                        await asyncio.sleep(self._timing.crypto_ask_seconds / 4)
                yield machine
        finally:
            await self._database.run(partial(crypto.ask, account=account, for_ms=0))

    async def _keep(self, machine: Machine) -> None:
        """Sync, until the device is asked for, or lost. Raises MatrixError when the homeserver is away for long."""
        await machine.fresh(0.0)
        self.status = Status("held", report=await self._own(machine))
        self.machine = machine
        self._began.set()
        log.info("device_held", user=machine.device.user_id, device=machine.device.device_id)
        trouble, pause = "", self._timing.crypto_sync_seconds
        while not machine.device.is_lost:
            started = time.monotonic()
            try:
                await machine.fresh(0.0)
            except LeaseLost:
                break
            except MatrixError as error:
                if error.error != trouble:
                    log.warning("device_waits", errcode=str(error.errcode), error=error.error[:300])
                trouble, pause = error.error, min(MAX_PAUSE, 2 * pause)
            else:
                pause = self._timing.crypto_sync_seconds
                if trouble:
                    log.info("device_goes_on", user=machine.device.user_id)
                    trouble = ""
            rest = min(MAX_PAUSE, max(pause, SYNC_SHARE * (time.monotonic() - started)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(machine.device.lost.wait(), rest)
        raise LeaseLost

    async def began(self, seconds: float) -> None:
        """Wait so long for the first outcome of `run`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._began.wait(), seconds)

    async def _claim(self, caller: Caller, seal: Seal) -> tuple[StoredDevice, DeviceLease]:
        """The device of this token, made if need be. Raises LeaseLost, CryptoError, MatrixError."""
        account = account_of(caller.user_id)
        if caller.device_id is None:
            raise CryptoError("the token has no device, which encryption needs: give the bridge a token from a login")
        if await self._is_asked_for(account):
            raise LeaseLost
        stored = await self._database.read(partial(crypto.device, account=account))
        if stored is None or stored.device_id != caller.device_id:
            await setup.require_free(self.server, caller.user_id, caller.device_id)
            new, now = setup.new_device(seal, caller.user_id, caller.device_id, stored), clock.now_ms()
            if stored is None:
                await self._database.run(partial(crypto.create, account=account, device=new, now=now))
            else:
                replace = partial(crypto.replace, account=account, device=new, now=now, owner=self.owner)
                if not await self._database.run(replace):
                    raise LeaseLost
                log.info("device_replaced", user=caller.user_id, before=stored.device_id, device=caller.device_id)
        lease = await self._database.run(
            partial(crypto.claim, account=account, owner=self.owner, lease_ms=self._lease_ms, alone=self._alone)
        )
        self._alone = False
        if lease is None:
            raise LeaseLost
        found = await self._database.read(partial(crypto.device, account=account))
        if found is None or found.device_id != caller.device_id:
            raise LeaseLost
        return found, lease

    async def _is_asked_for(self, account: str) -> bool:
        return not self._is_command and await self._database.read(partial(crypto.is_asked_for, account=account))

    async def _renew(self, device: OwnDevice) -> None:
        """Prolong the lease, and notice when a command asks for the device."""
        pause = self._lease_ms / 3000
        due = time.monotonic() + pause
        while not device.is_lost:
            await asyncio.sleep(min(pause, self._timing.crypto_ask_seconds))
            with contextlib.suppress(MatrixError):  # the store is away: the lease ends by itself
                if await self._is_asked_for(device.account_id):
                    log.info("device_lent", user=device.user_id, device=device.device_id)
                    device.lost.set()
                elif time.monotonic() >= due:
                    work = partial(crypto.renew, lease=device.lease, lease_ms=self._lease_ms)
                    if not await self._database.run(work):
                        device.lost.set()
                    due = time.monotonic() + pause

    async def _own(self, machine: Machine) -> Report:
        """Make the device the account's own, as far as that needs nobody. Raises MatrixError."""
        report = await setup.report(machine.device, self.server)
        if report.standing == "absent":
            await machine.publish()
            report = await setup.report(machine.device, self.server)
        try:
            is_whole = report.standing == "signed" and report.has_storage
            if not is_whole and (report.standing == "unsigned" or machine.device.cross_signing is not None):
                await setup.cross_sign(machine.device, self.server, password=self._password, show=self._show)
                report = await setup.report(machine.device, self.server)
        except (CryptoError, OSError) as error:
            log.warning("device_not_signed", error=error)
        except ProofNeeded as error:
            log.warning("device_not_signed", error=error.error, hint="`flowbridge device setup` asks for the password")
        if report.standing != "signed":
            log.warning(
                "device_unsigned", user=report.user_id, device=report.device_id, hint=setup.HINTS[report.standing]
            )
        return report

    def _failed(self, state: State, why: str) -> None:
        if why != self.status.trouble:
            (log.info if state == "elsewhere" else log.warning)("device_not_held", reason=why)
        self.status = Status(state, why)
