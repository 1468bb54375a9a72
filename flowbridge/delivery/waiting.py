"""What a queued event waits for, in words, for the delivery log."""

import time
from typing import NamedTuple

from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.breaker import Breaker
from flowbridge.store.delivery_log import Standing
from flowbridge.store.json_columns import from_json


class Waiting(NamedTuple):
    """`until`: when that ends or the event is tried again (ms), if it is known."""

    reason: str
    until: int | None = None


def waiting(limits: AccountLimits, breaker: Breaker, account: str, standing: Standing) -> Waiting:
    """Why an event is not sent yet: its homeserver, its account, its lane, or the events before it."""
    if breaker.is_open:
        return Waiting("the homeserver cannot be reached")
    pause = limits.pause_of(account)
    until = _in(pause) if 0 < pause < float("inf") else None
    if refusal := limits.refusal_of(account):
        return Waiting(f"the homeserver refuses the account: {refusal}", until)
    if pause:
        return Waiting("the homeserver limits how much this account may send", until)
    reason, until = _of_the_first(standing)
    if not standing.before:
        return Waiting(reason or "its turn comes", until)
    events = "an older event" if standing.before == 1 else f"{standing.before} older events"
    return Waiting(f"{events} of this room first" + (f"; of the first one: {reason}" if reason else ""), until)


def _of_the_first(standing: Standing) -> tuple[str, int | None]:
    """Why the first event of the lane is still queued, after its last attempt."""
    history = from_json(standing.history)
    last = history[-1] if history else {}
    if "error" not in last or last.get("status") == 200:
        return "", None
    until = standing.rests_until
    if "absent" in last:  # its own time: a waiting caller may cause attempts in between
        return str(last["error"]), until if last["absent"] is True else last["absent"][1]
    if standing.before:  # it may be another key's event, whose errors are private
        return "its last attempt failed", until
    return f"the last attempt failed: {last['error']}", until


def _in(seconds: float) -> int:
    return int((time.time() + seconds) * 1000)
