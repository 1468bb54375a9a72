"""The core put together, without HTTP in: what the server and the commands both stand on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from flowbridge import log
from flowbridge.callers import Callers
from flowbridge.catalogue import Catalogue
from flowbridge.homeserver import Address, AddressError, AddressUnknown, Homeserver, Locator, tls_context
from flowbridge.intake import Intake
from flowbridge.settings import Settings

LOCATE_SECONDS = 1.0


class Core:
    """The core, without HTTP in: what the commands use too. Raises AddressError or SchemaError when made."""

    def __init__(self, settings: Settings) -> None:
        tls = tls_context(settings.ca_file)
        self.settings = settings
        self.catalogue = Catalogue.load(settings.schemas_dir)
        self.locator = Locator(settings.base_url, tls, allow_http=settings.allow_http)
        self.homeserver = Homeserver(self.locator, tls, deadline=settings.wait_seconds)
        self.callers = Callers(settings, self.homeserver)
        self.intake = Intake(self.catalogue, self.callers, self.homeserver)

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
        """Know the homeserver's address, keep it fresh, close what was opened. Raises AddressError."""
        if self.locator.known is None:
            await self.locate()
        refreshing = asyncio.create_task(self.locator.keep_fresh())
        try:
            yield
        finally:
            refreshing.cancel()
            self.homeserver.close()


def _heard(asking: "asyncio.Future[Address]") -> None:
    """The end of a look-up that nobody waits for any more."""
    if not asking.cancelled() and isinstance(error := asking.exception(), AddressError):
        log.error("homeserver_address_wrong", error=error)
