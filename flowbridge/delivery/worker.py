"""The worker: which lanes are ours, what comes into them, and what callers hear of it.

A lane is an account in a room. Whoever holds a lane's lease sends its events in order; lanes never wait for each other.
"""

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

from flowbridge import log, metrics
from flowbridge.delivery.attempt import Carrier
from flowbridge.delivery.backpressure import Backpressure
from flowbridge.delivery.lane import Lane, LeaseLost, Shared
from flowbridge.delivery.pending import Tickets
from flowbridge.delivery.suspects import Suspects
from flowbridge.delivery.write_queue import Outcome, Ticket, WriteQueue
from flowbridge.homeserver.answers import Verdict
from flowbridge.limits.shares import Share
from flowbridge.store import Database, Fence, Row, StoreFull, StoreUnsure, abandoned, leases, outbox
from flowbridge.store.engine import reason
from flowbridge.store.leases import ASKED, Claim
from flowbridge.store.outbox import BATCH

POLL_SECONDS = 0.5
IDLE_SECONDS = 20.0  # after which a lane is given back
CLAIM_LANES = 200
MAX_LANES = 2_000  # that are held at once
MAX_HELD = 10_000  # events that are held in memory, in all lanes
HELD_BYTES = 128 * 1024 * 1024  # likewise: ten thousand of 60 kB would be 600 MB
PAUSED_SECONDS = 2.0  # an account that pauses for longer makes room for others
MAX_REST = 30.0
ASKED_SECONDS = 3.0  # for which a lane is left to a command that asks for it
DAY_SECONDS = 86_400.0
HEARD = 500  # deliveries that are asked about at once
ABSENT_WAKE_SECONDS = 2.0  # a lane that waits for an invitation is not woken for callers more often than this
WAKE_SECONDS = 5.0  # nor any other one
MAX_WANTED = 10_000  # lanes that are to be claimed before others
MAX_ASLEEP = 10_000  # lanes of which is remembered when they went to rest
ROTATED = 50  # lanes of an account with too many that make room for its others, at most this often:
ROTATE_SECONDS = 0.5
GRACE_SECONDS = 60.0  # after the start, to send what an outage of the bridge itself has made too old
MAX_WAITERS = 3_000  # callers that wait for an outcome: web/connections.py takes 4,096 connections


class Courier:
    """The worker. `deadline`: seconds that one attempt takes at most; `lease`: for which a lane is claimed.

    `set_aside`: seconds after which an event is given up that the homeserver fails at alone; 0: never.
    `share`: the fraction of the places to wait for an outcome that one caller may take. `keep_days`: after which an
    event that is not sent is given up, but not in the first seconds (`grace`).
    """

    def __init__(
        self,
        database: Database,
        write_queue: WriteQueue,
        backpressure: Backpressure,
        carrier: Carrier,
        *,
        deadline: float = 10.0,
        lease: float = 30.0,
        set_aside: float = 300.0,
        share: float = 1.0,
        keep_days: float = 7.0,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._waiters = Share(MAX_WAITERS, share)
        self._database = database
        self._write_queue = write_queue
        self._backpressure = backpressure
        self._carrier = carrier
        self._lease = lease
        self._owner = secrets.token_hex(8)
        self._lanes: dict[str, Lane] = {}
        self._tickets = Tickets()
        self._missed: set[str] = set()  # lanes for which something was offered while lanes were being claimed
        self._wanted: dict[str, None] = {}  # lanes to claim before others, and although they rest, in this order
        self._asleep: dict[str, float] = {}  # lanes that rest → when they may be woken for callers, monotonic
        self._releasing: set[str] = set()  # lanes that are being given back
        self._rotated_at = 0.0  # monotonic
        self._keep_days = keep_days
        self._shared = Shared(
            database,
            write_queue,
            backpressure,
            carrier,
            Suspects(database, set_aside),
            self._tickets,
            deadline,
            self._batch,
            self._renew,
            keep_days * DAY_SECONDS,
            time.monotonic() + grace,
        )
        carrier.on_refusal = self._refused
        self._most_held = MAX_HELD  # events that all lanes may hold
        self._asked: set[str] = set()  # lanes that a command wants for a moment
        self._wake = asyncio.Event()
        self._looks = False  # for what others have put into lanes of ours
        self._renewing: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None

    def offer(self, ticket: Ticket) -> None:
        """Take a new ticket: into its lane when that is ours and short, else by way of the store. Raises StoreFull.

        With several replicas always by way of the store: only there it is known what another one has accepted before.
        """
        self._backpressure.admit(ticket.row.lane, ticket.caller, ticket.measure())
        lane = self._lanes.get(ticket.row.lane)
        well = self._database.is_sqlite and not self._database.trouble  # else a failed commit could not be told as such
        direct = lane is not None and well and lane.takes() and self._batch() > 1
        ticket.urgent = not direct or ticket.idem is not None or not ticket.waiters
        ticket.dirty = lane is None or not self._database.is_sqlite or not lane.is_held()
        self._backpressure.add(ticket)
        try:
            self._write_queue.append(ticket)
        except StoreFull:
            self._backpressure.remove(ticket)
            raise
        self._tickets.know(ticket)
        ticket.committed.add_done_callback(lambda done: self._on_written(ticket, done))
        if lane is None:
            self._missed.add(ticket.row.lane)
            if ticket.waiters or self._backpressure.queued_in(ticket.row.lane) <= 1:
                self._want(ticket.row.lane)
            self._wake.set()
        elif direct:
            lane.put(ticket)
        else:
            lane.look()  # what is read from the store from here on is read after this commit
        if self._carrier.has_halts:
            self._knock([ticket])

    async def join(self, row: Row, *, waits: bool) -> Ticket:
        """The ticket of a delivery that was accepted before, to wait with."""
        known = self._tickets.get(row.delivery)
        ticket = known or self._tickets.of(row)
        ticket.waiters += waits
        try:
            if known is None:  # it may have been settled a moment ago
                await self._hear([row.delivery])
        except BaseException:
            self._unwait(ticket, waits=waits)
            raise
        self._tickets.leave(ticket)
        return ticket

    def may_wait(self, caller: str) -> bool:
        """Whether one more request of this caller may wait for an outcome."""
        return self._waiters.takes(caller)

    async def wait(self, ticket: Ticket, seconds: float) -> Outcome | None:
        """How the delivery ended; None when it has not, in this time. To be called once for each of its waiters."""
        loop = asyncio.get_running_loop()
        caller = ticket.caller
        self._waiters.add(caller)
        heard: asyncio.Future[None] = loop.create_future()  # asyncio.wait does the same, at several times the price
        hear = partial(_wake, heard)
        timer = loop.call_later(seconds, hear)
        ticket.settled.add_done_callback(hear)
        try:
            await heard
            return ticket.settled.result() if ticket.settled.done() else None
        finally:
            timer.cancel()
            ticket.settled.remove_done_callback(hear)
            self._waiters.remove(caller)
            self._unwait(ticket)

    def _unwait(self, ticket: Ticket, *, waits: bool = True) -> None:
        ticket.waiters -= waits
        self._tickets.leave(ticket)

    async def withdraw(self, ticket: Ticket) -> bool:
        """Take back what was never tried, and nobody else waits for. False when it was, or may have been elsewhere."""
        ticket = self._tickets.get(ticket.row.delivery) or ticket  # the one that a lane may have made meanwhile
        lane = self._lanes.get(ticket.row.lane)
        if lane is None or ticket.waiters or ticket.settled.done() or lane.is_uncertain(ticket):
            return False
        return await self._remove(ticket)

    async def cancel(self, delivery: str) -> bool:
        """Give a queued event up, tried or not. False when it is on its way just now, or not queued any more."""
        found = await self._database.run(lambda connection: outbox.waiting(connection, delivery))
        if found is None or found[1] not in (None, self._owner):
            return False
        ticket = self._tickets.of(found[0])
        lane = self._lanes.get(ticket.row.lane)
        if ticket.settled.done() or (lane is not None and lane.is_sending(ticket)):
            return False
        return await self._remove(ticket)

    async def give_up(self, names: Sequence[str], before: int) -> int:
        """Make dead letters of events in these lanes that were accepted before (ms), a piece of them; returns how many.

        What is on its way at this moment stays, and so does what another replica holds: each does this for its own. So
        do lanes with outcomes on their way to the disk: where that fails, the store says that these are queued, too.
        """
        busy = self._write_queue.unsettled_lanes()
        busy.update(name for name in names if (lane := self._lanes.get(name)) is not None and lane.at_work)
        names = [name for name in names if name not in busy]
        lanes = [lane for name in names if (lane := self._lanes.get(name)) is not None]
        for lane in lanes:
            self._drop(lane)
        work = partial(
            abandoned.give_up,
            names=names,
            before=before,
            why=f"it was not delivered within {self._keep_days:g} days",
            reasons=dict(self._carrier.distrusted),
            mine=[lane.fence for lane in lanes],
            exclude=set(self._write_queue.unwritten),
        )
        errors = await self._database.run(work, alone=True)
        for delivery, error in errors.items():
            metrics.count(metrics.settled, "dead")
            ticket = self._tickets.get(delivery)
            if ticket is not None and not ticket.settled.done():
                ticket.outcome = Outcome("dead", error=error)
                self._backpressure.remove(ticket)
                ticket.settled.set_result(ticket.outcome)
        self._wake.set()
        return len(errors)

    async def _remove(self, ticket: Ticket) -> bool:
        delivery = ticket.row.delivery
        removing = self._database.run(lambda connection: outbox.withdraw(connection, delivery, self._owner), alone=True)
        ticket.withdrawn = True
        self._tickets.know(ticket)  # for a lane that reads it from the store just now
        removing.add_done_callback(lambda _: self._on_removed(ticket, removing))
        return await asyncio.shield(removing)

    def _on_removed(self, ticket: Ticket, removing: "asyncio.Future[bool]") -> None:
        if removing.exception() is not None:  # it is still there
            ticket.withdrawn = False
            if not ticket.held and (lane := self._lanes.get(ticket.row.lane)) is not None:
                lane.look()
            self._tickets.leave(ticket)
            return
        if removing.result():
            self._backpressure.remove(ticket)
        if not ticket.settled.done():
            ticket.settled.set_result(None)

    async def joined(self, user_id: str, room_id: str) -> None:
        """A user has joined a room: what waits for that is tried at once."""
        with contextlib.suppress(Exception):  # then it is tried when its time comes
            names = await self._database.read(lambda connection: leases.lanes_in(connection, user_id, room_id))
            self._rouse_all(names)
            if not self._database.is_sqlite:
                # A replica that was told just before that the user is not in the room lets its lane rest by then.
                asyncio.get_running_loop().call_later(self._shared.deadline + 1.0, self._rouse_all, names)

    def _rouse_all(self, names: Sequence[str]) -> None:
        for name in names:
            self._asleep.pop(name, None)
            if (lane := self._lanes.get(name)) is not None:
                lane.is_roused = True
            self._want(name)

    def rouse(self, lane: str) -> None:
        """Try a lane at once if it rests, as far as is known here."""
        if self._asleep.pop(lane, None) is not None:
            self._want(lane)

    def wake(self, name: str | None = None) -> None:
        """There is something new in the store: in this lane, or perhaps in any that is held here.

        Of what is offered from here on nothing overtakes it in that lane.
        """
        if name is None:
            self._looks = True
        elif (lane := self._lanes.get(name)) is not None:
            lane.look()
        else:
            self._missed.add(name)
        self._wake.set()

    def hush(self) -> None:
        """Send those away who wait for an outcome: this process is about to end."""
        self._tickets.hush()

    def lanes(self) -> dict[str, int]:
        """How many lanes there are here: those `sending`, those that wait for a `pause` to end, those `idle`."""
        found = {"sending": 0, "pause": 0, "idle": 0, "uncertain": 0}
        for lane in self._lanes.values():
            kind = "sending" if lane.at_work else "pause" if lane.tickets else "idle"
            found[kind] += 1
            found["uncertain"] += lane.uncertain_since is not None
        return found

    async def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self, seconds: float = 10.0) -> None:
        """Finish what is under way, settle it, give all lanes back."""
        for task in (self._keeper, *self._telling):
            if task is not None:
                task.cancel()
        lanes = list(self._lanes.values())
        tasks = [lane.task for lane in lanes if lane.task is not None]
        for lane in lanes:
            lane.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for lane in lanes:
            self._forget(lane)
        self._carrier.close()
        self._write_queue.hurry()  # outcomes that the store has refused so far: nobody tries to write them later
        if not await self._unsettled(self._write_queue.unsettled_lanes()):  # else the leases run out: all is in doubt
            with contextlib.suppress(Exception):
                await self._database.run(lambda connection: leases.release_all(connection, self._owner), alone=True)

    @property
    def _lease_ms(self) -> int:
        return int(self._lease * 1000)

    def _batch(self) -> int:
        """How many events a lane may hold: with many lanes, few."""
        return max(1, min(BATCH, self._most_held // (len(self._lanes) + 1)))

    def _on_written(self, ticket: Ticket, done: "asyncio.Future[None]") -> None:
        error = None if done.cancelled() else done.exception()
        if error is None and ticket.existing is None:
            self._tickets.leave(ticket)
            if ticket.idem is not None and ticket.waiters:  # it could not be told before
                self._knock([ticket])
                if ticket.row.lane in self._asleep:
                    self._want(ticket.row.lane)
            return
        lane = self._lanes.get(ticket.row.lane)
        was_tried = ticket.outcome is not None or ticket.tried or (lane is not None and lane.is_sending(ticket))
        if error is not None and was_tried:
            return  # it is in the room, or may be: who waits hears of that
        ticket.withdrawn = True
        self._backpressure.remove(ticket)
        if lane is not None and isinstance(error, StoreUnsure):
            lane.look()  # it may be in the store: then it is sent from there
        if ticket.settled.done():
            return
        if error is None:
            ticket.settled.cancel()  # whoever waits does so with the delivery that was accepted before
        else:
            ticket.settled.set_exception(error)
            ticket.settled.exception()  # who waits hears of it; nobody else has to

    # which lanes are ours

    async def _keep(self) -> None:
        """Claim, renew, listen for the others; for ever."""
        renew_at = 0.0
        pace = self._lease / 3 if self._database.is_sqlite else POLL_SECONDS
        resumed = False
        while True:
            claims: Sequence[Claim] = ()
            try:
                if not resumed:  # here, since a disk may be full at the start
                    await self._database.resume(self._lease_ms)
                    resumed = True
                if self._looks or time.monotonic() >= renew_at:
                    self._looks = False
                    await self._renew()
                    await self._hear(self._tickets.waited_for())
                    renew_at = time.monotonic() + pace
                claims = await self._claim()
            except Exception as error:
                log.warning("store_away", error=reason(error))
            self._end_idle()
            if self._carrier.has_halts:  # also for those whose lane was on its way here when they came
                self._knock(self._tickets.waiting())
            if len(claims) < CLAIM_LANES:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wake.wait()
                self._wake.clear()

    def _end_idle(self) -> None:
        long_ago = time.monotonic() - IDLE_SECONDS
        for lane in self._lanes.values():
            lane.end_if_idle(long_ago)

    async def _claim(self) -> Sequence[Claim]:
        self._missed.clear()
        self._most_held = min(
            MAX_HELD, int(HELD_BYTES / max(self._backpressure.average, 1.0))
        )  # of large events, fewer
        if wanted := self._due():
            await self._claim_some(len(wanted), only=wanted)
            for name in wanted:
                del self._wanted[name]
        but = await self._make_room() if len(self._lanes) > MAX_LANES // 2 else []
        limit = min(CLAIM_LANES, MAX_LANES - len(self._lanes))
        return await self._claim_some(limit, but=but) if limit > 0 else ()

    def _due(self) -> list[str]:
        """The lanes that are to be claimed before all others: a caller waits, or their room was quiet until now.

        For these an account may have some lanes more than its share, and no more than that.
        """
        if not self._wanted:
            return []
        now = time.monotonic()
        held = Counter(lane.account for lane in self._lanes.values())
        most = MAX_LANES // (len(held) + 1) + CLAIM_LANES // 2
        room = min(CLAIM_LANES, MAX_LANES + CLAIM_LANES - len(self._lanes))
        due: list[str] = []
        for name in list(self._wanted):
            account = name.partition("|")[0]
            if name in self._lanes:
                del self._wanted[name]
            elif len(due) >= room:
                break
            elif name not in self._releasing and self._asleep.get(name, 0.0) <= now and held[account] < most:
                held[account] += 1
                due.append(name)
        return due

    def _want(self, lane: str) -> None:
        """Claim a lane before others. Of very many it is claimed when its turn comes."""
        if len(self._wanted) < MAX_WANTED:
            self._wanted[lane] = None
        self._wake.set()

    async def _claim_some(self, limit: int, *, but: Sequence[str] = (), only: Sequence[str] = ()) -> Sequence[Claim]:
        asked = time.monotonic()
        batch = max(1, min(BATCH, self._most_held // (len(self._lanes) + limit)))
        claims = await self._database.run(
            lambda connection: leases.claim(
                connection, self._owner, limit, self._lease_ms, batch=batch, exclude=but, only=only
            ),
            alone=True,
        )
        for claim in claims:
            self._take(claim, asked + self._lease, full=len(claim.rows) >= batch, is_fresh=bool(only))
        return claims

    def _take(self, claim: Claim, lease_until: float, *, full: bool, is_fresh: bool = False) -> None:
        name = claim.fence.lane
        old = self._lanes.get(name)
        if old is not None:
            self._drop(old)  # we had lost it, and have it anew
        # What was offered since the lane was read may lie in the store by now.
        full = full or old is not None or name in self._missed
        lane = self._lanes[name] = Lane(self._shared, claim, lease_until, full=full)
        lane.is_fresh = is_fresh
        lane.task = asyncio.create_task(self._attend(lane))

    async def _attend(self, lane: Lane) -> None:
        """Run a lane, and give it back when it is done."""
        rest = 0.0
        try:
            rest = await lane.run()
        except LeaseLost:
            self._lost(lane)
            return
        except Exception as error:  # nothing that goes wrong in one lane may stop it for good
            log.error("lane_failed", exc_info=error, lane=lane.fence.lane)
            rest = POLL_SECONDS
        finally:
            self._forget(lane)
        if lane.fence.lane in self._asked:
            self._asked.discard(lane.fence.lane)
            rest = max(rest, ASKED_SECONDS)
        await self._let_rest(lane, rest)

    async def _let_rest(self, lane: Lane, rest: float) -> None:
        name = lane.fence.lane
        if lane.is_roused and lane.rests_for == "absent":
            rest = 0.0
        if rest:
            if len(self._asleep) >= MAX_ASLEEP:
                del self._asleep[next(iter(self._asleep))]
            pause = ABSENT_WAKE_SECONDS if lane.rests_for == "absent" else WAKE_SECONDS
            self._asleep[name] = time.monotonic() + pause
        else:
            self._asleep.pop(name, None)
        self._releasing.add(name)
        try:
            await self._release([lane.fence], rest)
        finally:
            self._releasing.discard(name)
        if lane.rests_for == "absent" and self._tickets.waiting_in(name):  # they came too late to be told
            self._want(name)
        if name in self._wanted:
            self._wake.set()

    def _knock(self, tickets: Iterable[Ticket]) -> None:
        """Who waits with a token of its own is to hear whether the homeserver still refuses the account."""
        if self._carrier.has_halts:
            for account in {ticket.row.account for ticket in tickets if ticket.waiters and ticket.row.api_key is None}:
                self._carrier.knock(account)

    def _refused(self, account: str, found: Verdict) -> None:
        """The homeserver refuses an account: who waits for one of its events hears that."""
        waits = self._tickets.waiting_in
        if lanes := [lane for name, lane in self._lanes.items() if lane.account == account and waits(name)]:
            telling = asyncio.ensure_future(self._tell(account, lanes, found))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell(self, account: str, lanes: Sequence[Lane], found: Verdict) -> None:
        """Lane by lane: three thousand callers who were told in one go held up all others."""
        for lane in lanes:
            if self._carrier.refusal_of(account) and self._lanes.get(lane.fence.lane) is lane:
                await lane.refuse_waiting(found)

    def _forget(self, lane: Lane) -> None:
        """What comes for this lane from here on goes by way of the store."""
        lane.leave()
        if self._lanes.get(lane.fence.lane) is lane:
            del self._lanes[lane.fence.lane]

    def _drop(self, lane: Lane) -> None:
        """End a lane from outside; perhaps it has not even begun."""
        self._forget(lane)
        if lane.task is not None:
            lane.task.cancel()

    def _lost(self, lane: Lane) -> None:
        metrics.leases_lost.inc()
        log.warning("lease_lost", lane=lane.fence.lane)

    async def _release(self, fences: Sequence[Fence], rest: float = 0.0) -> None:
        with contextlib.suppress(Exception):  # then the lease runs out
            unsettled = await self._unsettled({fence.lane for fence in fences})
            fences = [fence for fence in fences if fence.lane not in unsettled]
            await self._database.run(
                lambda connection: leases.release(connection, fences, int(rest * 1000)), alone=True
            )
            if not rest:
                self._wake.set()

    async def _unsettled(self, names: set[str]) -> set[str]:
        """Those of these lanes, which send nothing any more, of which the store has refused to take an outcome.

        It is void without the lane, and the event would be sent once more, in no doubt. So the lane is kept until the
        outcome is written, and is a stray one then.
        """
        if not self._write_queue.unsettled_lanes() & names:
            return set()
        with contextlib.suppress(Exception):
            await self._database.run(lambda connection: None)  # those that are only on their way are written by then
        return self._write_queue.unsettled_lanes() & names

    async def _make_room(self) -> list[str]:
        """Give lanes back that send nothing just now; returns the accounts that shall have no more of them.

        A thousand rooms of one caller must not stand in the way of others, nor of one more room of the same caller.
        """
        paused = set(self._carrier.paused(PAUSED_SECONDS))
        resting: dict[str, list[Fence]] = defaultdict(list)
        for lane in list(self._lanes.values()):
            if lane.account in paused and not lane.at_work:
                self._drop(lane)
                resting[lane.account].append(lane.fence)
        for account, fences in resting.items():
            rest = min(self._carrier.pause_of(account), MAX_REST)
            asyncio.ensure_future(self._release(fences, rest))  # noqa: RUF006 (nobody asks how it ends)
        self._end_longest_idle(len(self._lanes) - MAX_LANES // 2)
        held = Counter(lane.account for lane in self._lanes.values())
        share = MAX_LANES // (len(held) + 1)
        many = [account for account, number in held.items() if number > share and account not in paused]
        if many:
            await self._rotate(many)
        return [*paused, *many]

    async def _rotate(self, accounts: Sequence[str]) -> None:
        """Of accounts with too many lanes let those make room that were served for longest, if others of them wait."""
        now = time.monotonic()
        if now < self._rotated_at + ROTATE_SECONDS:
            return
        self._rotated_at = now
        waiting = await self._database.read(lambda connection: leases.free(connection, accounts, ROTATED))
        fences: list[Fence] = []
        for lane in list(self._lanes.values()):  # as they were claimed
            if len(fences) >= waiting:
                break
            if lane.account in accounts and lane.has_more and lane.had_turn and not lane.at_work:
                self._drop(lane)
                fences.append(lane.fence)
        if fences:
            await self._release(fences)

    def _end_longest_idle(self, number: int) -> None:
        idle = [(lane.idle_since, lane) for lane in self._lanes.values() if lane.idle_since is not None]
        for _, lane in sorted(idle, key=lambda pair: pair[0])[: max(0, number)]:
            lane.end_if_idle(math.inf)

    async def _renew(self) -> None:
        """Prolong all leases; whoever asks meanwhile waits for the same answer."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_all())
        await asyncio.shield(self._renewing)

    async def _renew_all(self) -> None:
        asked = time.monotonic()
        held = await self._database.run(
            lambda connection: leases.renew(connection, self._owner, self._lease_ms), alone=True
        )
        for name, lane in list(self._lanes.items()):
            number, dirty = held.pop(name, (-1, 0))
            if number != lane.fence.number:
                self._lost(lane)
                self._drop(lane)
                continue
            lane.lease_until = asked + self._lease
            if dirty == ASKED:
                self._yield(lane)
            elif dirty:
                lane.look()
        stray = [Fence(name, self._owner, number) for name, (number, _) in held.items()]
        if stray:  # ours by the store, of which we know nothing: somebody shall have them
            await self._release(stray)

    def _yield(self, lane: Lane) -> None:
        """A command wants to remove events of this lane: give it back for a moment, without what is on its way."""
        if lane.at_work:
            self._asked.add(lane.fence.lane)
            lane.stop()
        else:
            self._drop(lane)
            asyncio.ensure_future(self._release([lane.fence], ASKED_SECONDS))  # noqa: RUF006 (the lease runs out if it fails)

    async def _hear(self, deliveries: Sequence[str]) -> None:
        """Learn how deliveries ended that somebody waits for here and that another process carried."""
        for start in range(0, len(deliveries), HEARD):
            asked = deliveries[start : start + HEARD]
            ended = await self._database.run(partial(outbox.outcomes, deliveries=asked))
            for delivery, (state, event_id, error) in ended.items():
                ticket = self._tickets.get(delivery)
                if ticket is not None and not ticket.settled.done():
                    ticket.settled.set_result(Outcome(state, event_id, error))


def _wake(heard: "asyncio.Future[None]", _: object = None) -> None:
    if not heard.done():
        heard.set_result(None)
