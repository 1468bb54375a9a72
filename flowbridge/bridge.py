"""The core put together, without HTTP in: what the server and the commands both stand on."""

import asyncio
import contextlib
import math
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.fernet import Fernet

from flowbridge import log
from flowbridge.auth.api_keys import ApiKeys
from flowbridge.auth.bot import Bot
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.identities import Identities
from flowbridge.auth.names import Names
from flowbridge.auth.refusals import Refusals
from flowbridge.auth.room_access import RoomAccess
from flowbridge.auth.tokens import Tokens, secret_key
from flowbridge.delivery import Beside, Worker
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.attempt import Attempts
from flowbridge.delivery.backpressure import Backpressure, Limits
from flowbridge.delivery.breaker import Breaker
from flowbridge.delivery.encryption import EncryptionCheck
from flowbridge.delivery.lookup import Lookup
from flowbridge.delivery.waiting import Waiting, waiting
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.errors import MatrixError
from flowbridge.events import Catalogue
from flowbridge.homeserver import Address, AddressError, AddressUnknown, Homeserver, Locator, Relay, tls_context
from flowbridge.hooks.administration import Administration
from flowbridge.hooks.admission import Admission
from flowbridge.hooks.receiving import Receiving
from flowbridge.hooks.registry import Registry
from flowbridge.hooks.requests import Requests
from flowbridge.hooks.rooms import HookRooms
from flowbridge.limits.processor import BODIES_SHARE, Account
from flowbridge.live import Live
from flowbridge.models import Caller
from flowbridge.models.proxy import Proxy
from flowbridge.models.timing import Timing
from flowbridge.rendering.processes import Rendering
from flowbridge.services.acceptance import Acceptance
from flowbridge.services.accounts import Accounts
from flowbridge.services.at_rest import AtRest
from flowbridge.services.deliveries import Deliveries
from flowbridge.services.direct_rooms import DirectRooms
from flowbridge.services.history import History
from flowbridge.services.invitations import Invitations
from flowbridge.services.maintenance import Maintenance
from flowbridge.services.media.files import Media
from flowbridge.services.media.transfer import Transfer
from flowbridge.services.messages import Messages
from flowbridge.services.readings import Readings
from flowbridge.services.refused_calls import RefusedCalls
from flowbridge.services.replays import Replays
from flowbridge.services.rooms import Rooms
from flowbridge.services.sending import Sender
from flowbridge.services.targets import Targets
from flowbridge.settings import Settings
from flowbridge.store import Database, crypto
from flowbridge.store.accounts import account_of
from flowbridge.store.delivery_log import Standing

if TYPE_CHECKING:
    from flowbridge.encryption.devices import Devices
    from flowbridge.encryption.keeper import Keeper, Who
    from flowbridge.outbound.fetch import Fetcher

LOCATE_SECONDS = 1.0
RECHECK_SECONDS = 5.0  # until the refused tokens of an account are tried once more, at first
MAX_RECHECK_SECONDS = 60.0
MAX_RECHECKS = 10_000
RECHECKED = 3  # tokens of an account that are tried: those that were seen last


class Core:
    """The core, without HTTP in. Raises AddressError, SchemaError or StoreError when made.

    `beside`: what is accepted here is delivered by another process, which has the store. `timing`: for tests.
    """

    def __init__(self, settings: Settings, *, beside: bool = False, timing: Timing | None = None) -> None:
        self._beside = beside
        self.timing = timing or Timing()
        tls = tls_context(settings.ca_file)
        self.settings = settings
        self.catalogue = Catalogue.load(settings.schemas_dir)
        proxy = Proxy.parse(settings.proxy.get_secret_value()) if settings.proxy else None
        self.locator = Locator(settings.base_url, tls, allow_http=settings.allow_http, proxy=proxy, timing=self.timing)
        self.homeserver = Homeserver(self.locator, tls, deadline=settings.request_seconds, timing=self.timing)
        self.relay = Relay(self.locator, tls, timing=self.timing)
        self.database = Database(settings.database_url.get_secret_value(), timing=self.timing)
        self.write_queue = WriteQueue(
            self.database, max_waiting=settings.max_waiting, share=settings.max_share, timing=self.timing
        )
        self.backpressure = Backpressure(self.database, _limits(settings), timing=self.timing)
        self.tokens = Tokens(self.database, self.write_queue.remember, timing=self.timing)
        self.names = Names(self.database)
        refusals = Refusals(settings.wrong_keys_per_minute, timing=self.timing)
        self.identities = Identities(
            self.homeserver,
            self.tokens.identity,
            refusals,
            on_seen=self._seen,
            on_revoked=self._revoked,
            timing=self.timing,
        )
        self.bot = Bot(settings, self.homeserver, self.identities, self.names, timing=self.timing)
        self.keys = ApiKeys(settings, self.database, timing=self.timing)
        self.callers = Callers(self.identities, self.keys, self.bot, refusals)
        self.room_access = RoomAccess(self.callers, self.homeserver, self.names, timing=self.timing)
        self.readings = Readings(self.database)
        self.replays = Replays(self.readings, self.homeserver, self.callers, self.tokens)
        self.devices = None if beside else self._make_devices()
        self.encryption = EncryptionCheck(
            self.homeserver,
            refuses=settings.encrypted_rooms != "allow",
            devices=self.devices,
            timing=self.timing,
        )
        if self.devices is not None:
            self.devices.keeper.on_rooms = self.encryption.forget
            self.homeserver.on_sync = self.devices.keep
            self.bot.device_of = self.devices.device_of
        self.breaker = Breaker(self.homeserver, timing=self.timing)
        self.account_limits = AccountLimits(
            self.tokens,
            self.breaker.limiter,
            on_refused=self.identities.forget,
            on_distrust=self._distrusted,
            timing=self.timing,
        )
        self.worker = (Beside if beside else Worker)(
            self.database,
            self.write_queue,
            self.backpressure,
            self.account_limits,
            Attempts(
                self.homeserver,
                self.tokens,
                self.account_limits,
                self.breaker,
                self.encryption,
                Lookup(self.homeserver, self.database),
                deadline=settings.request_seconds,
            ),
            deadline=settings.request_seconds,
            lease=settings.lease_seconds,
            set_aside=settings.set_aside_seconds,
            share=settings.max_share,
            keep_days=settings.keep_queued_days,
            encrypts=self.devices is not None,
            keeps=settings.keep_contents,
            timing=self.timing,
        )
        if self.devices is not None:
            self.devices.keeper.owner = self.worker.owner  # of lanes and of the device: see `leases.claim`
        seals = settings.is_to_encrypt or (settings.encrypted_rooms == "encrypt" and settings.has_bot)
        self.guests = Account(BODIES_SHARE)  # pays for the bodies that callers send who have not been authenticated
        self.acceptance = Acceptance(
            self.catalogue,
            self.room_access,
            self.tokens,
            self.worker,
            reused_txn_id=settings.reused_txn_id,
            at_rest=AtRest(self.database.contents, self.encryption.is_known_plain, seals=seals),
            guests=self.guests,
        )
        self.sender = Sender(
            self.acceptance,
            self.callers,
            self.room_access,
            self.homeserver,
            self.worker,
            self.account_limits,
            self.breaker,
        )
        self.refused_calls = RefusedCalls(self.database, seals=seals)
        self.deliveries = Deliveries(
            self.database,
            self.callers,
            self.tokens,
            self.room_access,
            self.replays,
            cancel=self.worker.cancel,
            wake=self.worker.wake,
            amended=self.write_queue.amended,
            waiting=self._waits_for,
            flush_refused=self.refused_calls.flush,
            readings=self.readings,
            keeps=settings.keep_contents,
        )
        sessions = self.devices.callers if self.devices is not None else None
        self.accounts = Accounts(settings, self.homeserver, self.callers, sessions)
        self.rooms = Rooms(self.homeserver, self.callers, self.room_access, joined=self.worker.joined)
        self.invitations = Invitations(
            settings.auto_join,
            self.bot,
            self.callers,
            self.homeserver,
            self.database,
            joined=self.worker.joined,
            timing=self.timing,
        )
        self.history = History(
            self.callers,
            self.room_access,
            self.homeserver,
            encrypted_rooms=settings.encrypted_rooms,
            shown=self.devices.shown if self.devices is not None else None,
        )
        self.media = Media(self.callers, self.homeserver, self.relay)
        self.transfer = Transfer(
            self.media,
            partial(self._fetcher, tls),
            self.encryption.encrypts_files,
            most_bytes=settings.max_file_bytes,
        )
        self.rendering = Rendering(timing=self.timing)
        self.messages = Messages(
            self.acceptance,
            self.sender,
            self.callers,
            self.room_access,
            self.worker,
            self.rendering,
            DirectRooms(self.callers, self.homeserver, self.names, self.encryption.encrypts_for),
            self.media,
            self.transfer,
            Targets(self.homeserver),
            self.encryption.encrypts_files,
        )
        self.registry = Registry(settings, self.database, timing=self.timing)
        self.requests = Requests(self.database)
        self.admission = Admission(self.registry, refusals, self.acceptance.aside)
        self.receiving = Receiving(
            self.registry,
            self.requests,
            self.rendering,
            self.acceptance,
            self.callers,
            self.messages,
            self.sender,
            self.transfer,
        )
        self.administration = Administration(
            self.database,
            self.registry,
            self.requests,
            self.rendering,
            self.receiving,
            standing=HookRooms(self.callers, self.room_access, self.homeserver).standing,
            limit=settings.max_hook_bytes,
        )
        late = partial(self.devices.shown, late=True) if self.devices is not None else None
        self.live = Live(self.homeserver, self.callers, shown=late, timing=self.timing)
        if self.devices is not None:
            self.devices.on_late = self.live.tell
        self.maintenance = Maintenance(
            settings,
            self.database,
            self.backpressure,
            self.keys,
            self.worker,
            flush_refused=self.refused_calls.flush,
            beside=[
                (self.registry.refresh, self.timing.key_refresh_seconds),
                (self.registry.flush, self.timing.refused_seconds),
                (self.requests.flush, self.timing.kept_seconds),
                (self._forget_ciphertexts, self.timing.purge_seconds),
            ],
            timing=self.timing,
        )
        self.tokens.on_change = self.account_limits.trust
        # By account: when its refused tokens are tried again, and the pause after that.
        self._rechecks: dict[str, tuple[float, float]] = {}

    def open(self, *, required: bool = False) -> None:
        """Open the store; only who accepts events needs it. Raises StoreError or SettingsError.

        When there is none it is created, unless it is `required`, or another process' own.
        """
        self.database.open(shared=self._beside, required=required)
        secret = secret_key(self.settings)
        self.database.contents.unlock(secret)
        fernet = Fernet(secret)
        self.tokens.unlock(fernet)
        self.requests.open(fernet)
        if not self._beside:
            self.registry.open(fernet)
        if self.devices is not None:
            from flowbridge.encryption.sealing import Seal

            self.devices.keeper.unlock(Seal(secret))

    def _make_devices(self) -> "Devices | None":
        """The device of the bot, where the bridge is to encrypt."""
        settings = self.settings
        if settings.encrypted_rooms != "encrypt" or not settings.has_bot:
            return None
        from flowbridge.encryption.callers import CallerDevices
        from flowbridge.encryption.devices import Devices  # with a library that may not be installed
        from flowbridge.encryption.recovery_file import Shown

        keeper = self.make_keeper(Shown(Path(f"{settings.database_file or 'flowbridge'}.recovery-key")))
        callers = CallerDevices(
            self.database,
            self._keeper_of,
            self.tokens.of_device,
            lambda user_id: user_id == self.bot.user_id,
            timing=self.timing,
        )
        return Devices(
            self.database,
            keeper,
            callers,
            lambda: self.bot.user_id,
            from_start=settings.is_to_encrypt,
            timing=self.timing,
        )

    def _keeper_of(self, who: "Who") -> "Keeper":
        """What keeps the device of a caller. It makes no keys for the account, so that nothing is to be shown."""
        from flowbridge.encryption.keeper import Keeper

        keeper = Keeper(
            self.database,
            self.homeserver,
            who,
            owner=self.worker.owner,
            alone=self.database.is_sqlite,
            lease_seconds=self.settings.lease_seconds,
            show=lambda _: None,
            timing=self.timing,
        )
        assert self.devices is not None
        keeper.unlock(self.devices.keeper.seal)
        keeper.on_rooms = self.encryption.forget
        return keeper

    def make_keeper(self, show: Callable[[str], None], *, password: str = "", command: bool = False) -> "Keeper":
        """What keeps the bot's device; for a `command` beside the bridge, perhaps."""
        from flowbridge.encryption.keeper import Keeper

        settings = self.settings
        return Keeper(
            self.database,
            self.homeserver,
            self.bot.caller,
            owner=secrets.token_hex(8),
            alone=self.database.is_sqlite and not command,
            lease_seconds=settings.lease_seconds,
            show=show,
            password=password or (settings.password.get_secret_value() if settings.password else ""),
            command=command,
            verify_users=settings.verify_users,
            timing=self.timing,
        )

    async def locate(self) -> None:
        """Learn the homeserver's address, for a second at most: a slow network must not hold up the start.

        Raises AddressError when it is wrong; when it is only not known yet, a line in the log says so.
        """
        asking = asyncio.ensure_future(self.locator.address())
        try:
            await asyncio.wait_for(asyncio.shield(asking), LOCATE_SECONDS)
        except (AddressUnknown, TimeoutError) as error:
            log.warning(
                "homeserver_unknown", error=str(error) or "no answer yet", hint="/readyz tells when it is found"
            )
            asking.add_done_callback(_heard)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Know the homeserver's address and deliver, until it ends. Raises AddressError, StoreError, SettingsError."""
        self.open()
        if self.locator.known is None:
            await self.locate()
        self.database.start()
        self.names.begin()
        self.bot.on_new = self.tokens.remember
        self.acceptance.at_rest.has_sealed = await self.database.read(crypto.has_devices)
        await self.backpressure.refresh()
        await self.keys.refresh()
        if not self._beside:
            await self.registry.refresh()
        await self.worker.start()
        tasks = [asyncio.create_task(self.locator.keep_fresh())]
        if not self._beside:
            tasks.append(asyncio.create_task(self.maintenance.run()))
        if not self._beside and self.bot.is_configured:
            tasks.append(asyncio.create_task(self.invitations.run()))
        keeping = asyncio.create_task(self.devices.run()) if self.devices is not None else None
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            self.live.stop()
            await self.rendering.stop()
            await self.transfer.close()
            await self.worker.stop()
            if keeping is not None:
                keeping.cancel()
                await asyncio.wait([keeping])
            if self.devices is not None:
                await self.devices.callers.stop()
            self.breaker.stop()
            await self.database.stop()
            self.homeserver.close()
            self.relay.close()

    async def reload(self) -> None:
        """Learn the homeserver's address again, the bot's token or password where they are in files, and hooks.yaml."""
        await self.administration.reload()
        await self.locator.refresh()
        await self.bot.reload()

    async def _forget_ciphertexts(self) -> None:
        if self.devices is not None:
            await self.database.run(crypto.forget_ciphertexts, lingers=True)

    def _fetcher(self, tls: ssl.SSLContext) -> "Fetcher":
        from flowbridge.outbound.destination import Allowed
        from flowbridge.outbound.fetch import Fetcher  # httpcore and httpx, which most bridges never need

        return Fetcher(tls, Allowed(self.settings.fetch_allow), timing=self.timing)

    def _waits_for(self, row: Mapping[str, Any], standing: Standing) -> Waiting:
        """What a queued event waits for."""
        is_sending, me = self.worker.is_sending(row["delivery"]), self.worker.owner
        return waiting(self.account_limits, self.breaker, row["account"], standing, is_sending=is_sending, me=me)

    def _seen(self, caller: Caller) -> None:
        """A token is good: events that wait for a token of its user are sent with it, whatever it came for."""
        if account_of(caller.user_id) in self.account_limits.distrusted:
            self.tokens.remember(caller)

    def _revoked(self, user_id: str) -> None:
        """A user has ended tokens of its own: what was seen of its others does not count any more."""
        self.tokens.doubt(user_id)
        self.live.end(user_id)

    async def _distrusted(self, account: str, token: str) -> None:
        """The homeserver accepts no token of an account: log the bot in again, try those that it has once more."""
        known = self.bot.user_id
        if known is None or account_of(known) == account:
            with contextlib.suppress(MatrixError):  # who the bot is may not be known, and the account another one
                bot = await self.bot.renew(token) if token else await self.bot.caller()
                if bot is not None:
                    self.tokens.remember(bot)
        if await self.tokens.of(account) is not None:  # perhaps one that another process was given
            self.account_limits.trust(account)
            return
        if not self.tokens.knows(account):
            await self.identities.ask_again(lambda user_id: account_of(user_id) == account, but=token)
        if not self.tokens.knows(account):
            await self._recheck(account)

    async def _recheck(self, account: str) -> None:
        """Ask whose the refused tokens of an account are: it may have been locked, and not be any more.

        Half as often each time, for a token that is refused mostly stays so.
        """
        now = time.monotonic()
        at, pause = self._rechecks.get(account, (math.inf, RECHECK_SECONDS))
        if now < at < math.inf:
            return
        if len(self._rechecks) >= MAX_RECHECKS:
            self._rechecks.clear()
        self._rechecks[account] = (now + pause, min(2 * pause, MAX_RECHECK_SECONDS))
        if at == math.inf:  # it has been refused in this moment
            return
        for token in (await self.tokens.refused(account))[:RECHECKED]:
            with contextlib.suppress(MatrixError):
                self.tokens.remember(await self.callers.identify(Credential(token)))
        if self.tokens.knows(account):
            del self._rechecks[account]


def _limits(settings: Settings) -> Limits:
    return Limits(
        queued=settings.max_queued,
        per_lane=settings.max_queued_per_room,
        database_bytes=settings.max_database_bytes,
        free_disk_bytes=settings.min_free_disk_bytes,
        share=settings.max_share,
    )


def _heard(asking: "asyncio.Future[Address]") -> None:
    """The end of a look-up that nobody waits for any more."""
    if not asking.cancelled() and isinstance(error := asking.exception(), AddressError):
        log.error("homeserver_address_wrong", error=error)
