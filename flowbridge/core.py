"""The core put together, without HTTP in: what the server and the commands both stand on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from flowbridge import log
from flowbridge.aliases import Aliases
from flowbridge.callers import Callers
from flowbridge.catalogue import Catalogue
from flowbridge.delivery import Courier
from flowbridge.delivery.carrier import Carrier
from flowbridge.history import History
from flowbridge.homeserver import Address, AddressError, AddressUnknown, Homeserver, Locator, Relay, tls_context
from flowbridge.intake import Intake
from flowbridge.keyring import Keyring
from flowbridge.live import Live
from flowbridge.media import Media
from flowbridge.processor import Account
from flowbridge.settings import Settings
from flowbridge.store import Database
from flowbridge.store.journal import Journal
from flowbridge.store.stock import Limits, Stock
from flowbridge.tokens import Tokens, cipher
from flowbridge.upkeep import Upkeep

LOCATE_SECONDS = 1.0


class Core:
    """The core, without HTTP in. Raises AddressError, SchemaError or StoreError when made."""

    def __init__(self, settings: Settings) -> None:
        tls = tls_context(settings.ca_file)
        self.settings = settings
        self.catalogue = Catalogue.load(settings.schemas_dir)
        self.locator = Locator(settings.base_url, tls, allow_http=settings.allow_http)
        self.homeserver = Homeserver(self.locator, tls, deadline=settings.request_seconds)
        self.relay = Relay(self.locator, tls)
        self.database = Database(settings.database_url.get_secret_value())
        self.journal = Journal(self.database, max_waiting=settings.max_waiting)
        self.stock = Stock(self.database, _limits(settings))
        self.tokens = Tokens(self.database, self.journal)
        self.callers = Callers(settings, self.homeserver, self.tokens.identity, Keyring(settings, self.database))
        self.aliases = Aliases(self.callers, self.homeserver)
        self.carrier = Carrier(
            self.homeserver,
            self.tokens,
            self.database,
            refuse_encrypted=settings.encrypted_rooms == "refuse",
            deadline=settings.request_seconds,
        )
        self.courier = Courier(
            self.database,
            self.journal,
            self.stock,
            self.carrier,
            deadline=settings.request_seconds,
            lease=settings.lease_seconds,
        )
        self.guests = Account()  # pays for the bodies that callers send who have not been authenticated
        self.intake = Intake(
            self.catalogue,
            self.callers,
            self.aliases,
            self.tokens,
            self.courier,
            reused_txn_id=settings.reused_txn_id,
            guests=self.guests,
        )
        self.history = History(self.callers, self.aliases, self.homeserver)
        self.media = Media(self.callers, self.homeserver, self.relay)
        self.live = Live(self.homeserver, self.callers)
        self.upkeep = Upkeep(settings, self.database, self.stock, self.callers)
        self.tokens.on_change = self.carrier.trust
        self.carrier.on_distrust = self._distrusted

    def open(self) -> None:
        """Open the store; only who accepts events needs it. Raises StoreError or SettingsError."""
        self.database.open()
        self.tokens.unlock(cipher(self.settings))

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
        await self.stock.refresh()
        await self.callers.refresh()
        await self.courier.start()
        beside = [asyncio.create_task(self.locator.keep_fresh()), asyncio.create_task(self.upkeep.run())]
        try:
            yield
        finally:
            for task in beside:
                task.cancel()
            self.live.stop()
            await self.courier.stop()
            await self.database.stop()
            self.homeserver.close()
            self.relay.close()

    async def _distrusted(self, account: str, token: str) -> None:
        """The homeserver does not accept a token any more: ask anew whose it is, and log the bot in again."""
        self.tokens.forget(account)
        self.callers.forget(token)
        bot = await self.callers.renew_bot(token) if token else await self.callers.bot()
        if bot is not None:
            self.tokens.remember(bot)


def _limits(settings: Settings) -> Limits:
    return Limits(
        queued=settings.max_queued,
        per_lane=settings.max_queued_per_room,
        database_bytes=settings.max_database_bytes,
        free_disk_bytes=settings.min_free_disk_bytes,
    )


def _heard(asking: "asyncio.Future[Address]") -> None:
    """The end of a look-up that nobody waits for any more."""
    if not asking.cancelled() and isinstance(error := asking.exception(), AddressError):
        log.error("homeserver_address_wrong", error=error)
