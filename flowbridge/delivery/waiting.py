"""What a queued event waits for, in words, for the delivery log."""

import time
from typing import NamedTuple

from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.breaker import Breaker
from flowbridge.store import clock
from flowbridge.store.delivery_log import Standing
from flowbridge.store.json_columns import from_json


class Waiting(NamedTuple):
    """`until`: when that ends or the event is tried again (ms), if known. `behind`: the first event of the room."""

    reason: str
    until: int | None = None
    behind: str | None = None


def waiting(
    limits: AccountLimits,
    breaker: Breaker,
    account: str,
    standing: Standing,
    *,
    is_sending: bool = False,
    me: str | None = None,
) -> Waiting:
    """Why an event is not sent yet: its homeserver, its account, its lane, or the events before it.

    `is_sending`: this process has a request of it in flight. `me`: the owner of this process' lanes; what another one
    sends is known from the store alone.
    """
    if is_sending:
        return Waiting("it is being sent")
    if standing.owner not in (None, me):
        return in_store(standing)
    if breaker.is_open:
        return Waiting("the homeserver cannot be reached", _in(breaker.probes_in))
    pause = limits.pause_of(account)
    until = _in(pause) if 0 < pause < float("inf") else None
    if refusal := limits.refusal_of(account):
        return Waiting(f"the homeserver refuses the account: {refusal}", until)
    if pause:
        return Waiting("the homeserver limits how much this account may send", until)
    return in_store(standing, is_mine=True)


def in_store(standing: Standing, *, is_mine: bool = False) -> Waiting:
    """The same as far as the store says it: for a command, or what another replica sends.

    `is_mine`: this process knows all of its account and of its lane.
    """
    reason, until = _of_the_first(standing)
    if not reason and standing.is_locked_out:
        reason = "no access token of its account is accepted"
    if not standing.before:
        is_sending = standing.owner is not None and not is_mine
        return Waiting(reason or ("it is being sent" if is_sending else "its turn comes"), until)
    events = "an older event" if standing.before == 1 else f"{standing.before} older events"
    told = f"{events} of this room first" + (f"; of the first one: {reason}" if reason else "")
    return Waiting(told, until, standing.first)


def _of_the_first(standing: Standing) -> tuple[str, int | None]:
    """Why the first event of the lane is still queued, after its last attempt."""
    history = from_json(standing.history)
    last = history[-1] if history else {}
    if "error" not in last or last.get("status") == 200:
        return "", None
    if paused := last.get("paused"):
        kind, ends = paused
        is_over = ends is not None and ends <= clock.now_ms()
        if kind == "slow":
            return ("", None) if is_over else ("the homeserver limits how much this account may send", ends)
        return f"the homeserver refuses the account: {last['error']}", None if is_over else ends
    until = standing.rests_until
    if "absent" in last:  # its own time: a waiting caller may cause attempts in between
        return str(last["error"]), until if last["absent"] is True else last["absent"][1]
    if standing.before:  # it may be another key's event, whose errors are private
        return "its last attempt failed", until
    return f"the last attempt failed: {last['error']}", until


def _in(seconds: float) -> int:
    return int((time.time() + seconds) * 1000)
