"""Raw HTTP by chance."""

import asyncio
import json
import time
from dataclasses import replace

from tests.chaos.fuzzer import Caller, fuzz
from tests.chaos.judge import read_lines
from tests.chaos.options import Options
from tests.chaos.report import Report
from tests.chaos.stage import stage

CALLERS = 16
SHOWN = 5


async def wire(options: Options) -> Report:
    """Heads, bodies, pipelines and segments of raw HTTP by chance: what came is compared with what was sent."""
    options = replace(options, rooms=CALLERS, fire=0, states=0, matrix=0)
    async with stage(options) as it:
        headers = it.plan.headers
        callers = []
        for index, room in enumerate(it.plan.room_ids()):
            ((name, value),) = headers[index % len(headers)].items()
            callers.append(Caller(room, f"{name}: {value}", str(index)))
        with it.accepted_log.open("ab", buffering=0) as log:

            def accepted(caller: Caller, n: int, event_id: str) -> None:
                line = {"room": caller.room, "n": n, "status": 200, "event_id": event_id, "at": time.time(), "ms": 0.0}
                log.write(json.dumps(line).encode() + b"\n")

            watch = asyncio.ensure_future(it.monkey.watch())
            try:
                url = it.bridge.url
                found = await fuzz(url, callers, options.seed, lambda: asyncio.sleep(options.seconds), accepted)
            finally:
                watch.cancel()
        shown = "".join(f"\n      {fault}" for fault in found.faults[:SHOWN])
        what = f"answers that are not to what was sent: {len(found.faults):,} of {found.requests:,}{shown}"
        it.check("wire", what, not found.faults, f"{found.requests:,} requests, {found.conversations:,} connections")
        altered = sum(line.get("altered", False) for line in read_lines(it.homeserver.log))
        it.check("altered", f"events that came altered: {altered:,}", not altered)
        it.notes.append(f"    {', '.join(f'{kind}: {times:,}' for kind, times in found.kinds.most_common())}")
        return await it.report("wire", await it.drain())
