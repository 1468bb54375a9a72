"""Accept events beside the process that delivers them: by way of its store, which also has their outcomes."""

import asyncio

from flowbridge import log
from flowbridge.delivery.worker import Worker
from flowbridge.store.engine import reason


class Beside(Worker):
    """Claims no lane: each event goes by way of the store, as between replicas."""

    async def start(self) -> None:
        self._keeper = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            try:
                await self._learn_outcomes(self._deliveries.held_elsewhere())
            except Exception as error:
                log.warning("store_away", error=reason(error))
            await asyncio.sleep(self._timing.poll_seconds)
