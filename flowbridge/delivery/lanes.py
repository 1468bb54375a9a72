"""The lanes that this process holds: claimed under a lease, renewed, and given back to make room for others."""

import asyncio
import contextlib
import math
import secrets
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from flowbridge import log, metrics
from flowbridge.delivery.account_limits import AccountLimits
from flowbridge.delivery.backpressure import Backpressure
from flowbridge.delivery.fairness import share_of_lanes
from flowbridge.delivery.lane import Lane, LeaseLost
from flowbridge.delivery.pending import PendingDeliveries
from flowbridge.delivery.write_queue import WriteQueue
from flowbridge.limits.tasks import Once
from flowbridge.models.timing import Timing
from flowbridge.store import Database, Fence, leases
from flowbridge.store.leases import ASKED, MERGED, Claim
from flowbridge.store.outbox import BATCH

PAUSED_SECONDS = 2.0  # an account that pauses for longer makes room for others
MAX_WANTED = 10_000  # lanes to be claimed before others
MAX_ASLEEP = 10_000  # resting lanes that are remembered
MAX_CLEAN = 50_000  # lanes that are reopened without a look into the store: some 300 bytes each, 15 MB
TOGETHER_SECONDS = 0.1  # in which lanes that are done are given back by one statement
ROTATED = 50  # lanes of an account with too many that make room for its other lanes …
ROTATE_SECONDS = 0.5  # … at most this often


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much a worker holds and asks for at once."""

    lanes: int = 2_000  # that are held
    claims: int = 200  # lanes in one claim
    batch: int = BATCH  # events of a lane in memory
    events: int = 10_000  # likewise of all lanes …
    bytes: int = 128 * 1024 * 1024  # … and no more than this: ten thousand of 60 kB would be 600 MB
    outcomes: int = 500  # deliveries in one question for outcomes


class Lanes:
    """`make`: a lane out of its claim, the end of its lease (monotonic), and whether the store may have more of it.

    `lease`: seconds for which a lane is claimed.
    """

    def __init__(
        self,
        database: Database,
        write_queue: WriteQueue,
        backpressure: Backpressure,
        limits: AccountLimits,
        deliveries: PendingDeliveries,
        make: Callable[[Claim, float, bool], Lane],
        *,
        lease: float,
        encrypts: bool = False,
        timing: Timing,
        bounds: Bounds,
    ) -> None:
        self._encrypts = encrypts
        self._database = database
        self._write_queue = write_queue
        self._backpressure = backpressure
        self._limits = limits
        self._deliveries = deliveries
        self._make = make
        self._lease = lease
        self._timing = timing
        self._bounds = bounds
        self.owner = secrets.token_hex(8)
        self._held: dict[str, Lane] = {}
        self.idle: dict[Lane, None] = {}  # those with nothing to send, the longest idle first
        # On a file of our own no other process claims a lane: what was given back with nothing in it, and in no doubt,
        # is still so. Its last fence, and the token that it was sent with.
        self._clean: dict[str, tuple[int, str]] = {}
        self._missed: set[str] = set()  # lanes that were offered an event while lanes were being claimed
        self._wanted: dict[str, None] = {}  # lanes to claim before others, in this order, even if they rest
        self._asleep: dict[str, float] = {}  # resting lanes → when callers may have them woken, monotonic
        self._releasing: set[str] = set()  # lanes whose release is under way
        self._done: list[tuple[Fence, str]] = []  # likewise: lanes that are given back together
        self._asked: set[str] = set()  # lanes that a command wants for a moment
        self._rotated_at = 0.0  # monotonic
        self._most_held = bounds.events  # events that all lanes together may hold
        self._wake = asyncio.Event()
        self._renewing: Once[None, None] = Once()

    def get(self, name: str) -> Lane | None:
        return self._held.get(name)

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._held.values()))

    def count(self) -> dict[str, int]:
        """How many lanes are held: `sending`, in a `pause`, or `idle`; `uncertain` counts across these."""
        found = {"sending": 0, "pause": 0, "idle": 0, "uncertain": 0}
        for lane in self._held.values():
            kind = "sending" if lane.at_work else "pause" if lane.queue else "idle"
            found[kind] += 1
            found["uncertain"] += lane.uncertain_since is not None
        return found

    def batch(self) -> int:
        """How many events a lane may hold: the more lanes, the fewer."""
        return max(1, min(self._bounds.batch, self._most_held // (len(self._held) + 1)))

    @property
    def lease_ms(self) -> int:
        return int(self._lease * 1000)

    # what lanes are wanted

    def miss(self, name: str) -> None:
        """The store has, or gets, an event of a lane that is not held."""
        self._clean.pop(name, None)
        self._missed.add(name)

    def want(self, name: str) -> None:
        """Claim a lane before others; beyond MAX_WANTED, when its turn comes."""
        if len(self._wanted) < MAX_WANTED:
            self._wanted[name] = None
        self._wake.set()

    def rouse(self, name: str) -> None:
        """Try a lane at once if it is known here to rest."""
        if self._asleep.pop(name, None) is not None:
            self.want(name)

    def rouse_all(self, names: Sequence[str]) -> None:
        """The account of these lanes has joined their room."""
        for name in names:
            self._asleep.pop(name, None)
            if (lane := self._held.get(name)) is not None:
                lane.is_roused = True
            self.want(name)

    def rests(self, name: str) -> bool:
        return name in self._asleep

    def wake(self) -> None:
        """There may be lanes to claim."""
        self._wake.set()

    async def woken(self) -> None:
        """Until there may be lanes to claim, or it is time for a look."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.poll_seconds):
                await self._wake.wait()
        self._wake.clear()

    # claims

    async def claim(self) -> bool:
        """Claim lanes that have something to send; whether there may be more of them."""
        self._missed.clear()
        self._most_held = min(
            self._bounds.events, int(self._bounds.bytes / max(self._backpressure.average, 1.0))
        )  # of large events, fewer
        if wanted := self._due():
            await self._claim_some(len(wanted), only=wanted)
            for name in wanted:
                del self._wanted[name]
        but = await self._make_room() if len(self._held) > self._bounds.lanes // 2 else []
        limit = min(self._bounds.claims, self._bounds.lanes - len(self._held))
        return limit > 0 and len(await self._claim_some(limit, but=but)) >= self._bounds.claims

    def _due(self) -> list[str]:
        """The lanes to claim before all others, since a caller waits or their room was quiet until now.

        For these an account may exceed its share, by half a claim at most.
        """
        if not self._wanted:
            return []
        now = time.monotonic()
        held = Counter(lane.account for lane in self._held.values())
        most = share_of_lanes(held, self._bounds.lanes) + self._bounds.claims // 2
        room = min(self._bounds.claims, self._bounds.lanes + self._bounds.claims - len(self._held))
        due: list[str] = []
        for name in list(self._wanted):
            account = name.partition("|")[0]
            if name in self._held:
                del self._wanted[name]
            elif len(due) >= room:
                break
            elif name not in self._releasing and self._asleep.get(name, 0.0) <= now and held[account] < most:
                held[account] += 1
                due.append(name)
        return due

    async def _claim_some(self, limit: int, *, but: Sequence[str] = (), only: Sequence[str] = ()) -> Sequence[Claim]:
        asked = time.monotonic()
        batch = max(1, min(self._bounds.batch, self._most_held // (len(self._held) + limit)))
        claims = await self._database.run(
            lambda connection: leases.claim(
                connection,
                self.owner,
                limit,
                self.lease_ms,
                batch=batch,
                exclude=but,
                only=only,
                encrypts=self._encrypts,
            ),
            alone=True,
        )
        for claim in claims:
            self._take(claim, asked + self._lease, full=len(claim.rows) >= batch, is_fresh=bool(only))
        return claims

    def _take(self, claim: Claim, lease_until: float, *, full: bool, is_fresh: bool = False) -> None:
        name = claim.fence.lane
        self._clean.pop(name, None)
        old = self._held.get(name)
        if old is not None:
            if old.fence.number >= claim.fence.number:  # reopened while it was being claimed, and so written behind it
                old.expect_more()
                return
            self.drop(old)  # it was lost, and claimed again
        # Events offered since the lane was read may be in the store by now.
        full = full or old is not None or name in self._missed
        self._begin(claim, lease_until, full=full).is_fresh = is_fresh

    def _begin(self, claim: Claim, lease_until: float, *, full: bool) -> Lane:
        lane = self._held[claim.fence.lane] = self._make(claim, lease_until, full)
        lane.task = asyncio.create_task(self._attend(lane))
        return lane

    def reopen(self, name: str) -> Lane | None:
        """Take back a lane that was given back with nothing in it; None if it has to be claimed from the store.

        The claim is written with the lane's next event: a send into the next of many rooms costs two short statements
        in commits that there are anyway, instead of a claim, a read, a release and the commits of these.
        """
        number, sent_with = self._clean.pop(name, (0, ""))
        if not number or name in self._wanted or name in self._releasing or self._backpressure.queued_in(name):
            return None
        if len(self._held) >= self._bounds.lanes // 2 and not self._end_longest_idle(2):
            return None
        fence, account = Fence(name, self.owner, number + 1), name.partition("|")[0]
        lane = self._begin(Claim(fence, account, None, sent_with, []), time.monotonic() + self._lease, full=False)
        lane.is_claimed = False
        lane.is_fresh = True
        return lane

    # leases

    async def renew(self) -> None:
        """Prolong all leases; concurrent calls share one statement."""
        await self._renewing.get(None, self._renew_all)

    async def _renew_all(self) -> None:
        asked = time.monotonic()
        known = {lane for lane in self._held.values() if lane.is_claimed}
        held = await self._database.run(
            lambda connection: leases.renew(connection, self.owner, self.lease_ms), alone=True
        )
        for name, lane in list(self._held.items()):
            number, dirty = held.pop(name, (-1, 0))
            if lane not in known:  # reopened: its claim is on its way to the disk, or came later
                continue
            if number != lane.fence.number:
                self._lost(lane)
                self.drop(lane)
                continue
            lane.lease_until = asked + self._lease
            if dirty == ASKED:
                self._yield(lane)
            elif dirty:
                lane.expect_more()
        stray = [Fence(name, self.owner, number) for name, (number, _) in held.items()]
        if stray:  # held here according to the store, and unknown: let any process claim them
            await self._release(stray)

    def _yield(self, lane: Lane) -> None:
        """A command wants to remove events of this lane: release it for a moment, once nothing of it is in flight."""
        if lane.at_work:
            self._asked.add(lane.fence.lane)
            lane.stop()
        else:
            self.drop(lane)
            asyncio.ensure_future(self._release([lane.fence], self._timing.yield_seconds))  # noqa: RUF006 (the lease expires if it fails)

    def _lost(self, lane: Lane) -> None:
        metrics.leases_lost.inc()
        log.warning("lease_lost", lane=lane.fence.lane)

    async def _attend(self, lane: Lane) -> None:
        """Run a lane, and release it when it is done."""
        rest, is_clean = 0.0, False
        try:
            rest = await lane.run()
            is_clean = lane.is_clean and not rest
        except LeaseLost:
            self._lost(lane)
            return
        except Exception as error:  # a fault in one lane must not stop it for good
            log.error("lane_failed", exc_info=error, lane=lane.fence.lane)
            rest = self._timing.poll_seconds
        finally:
            self.forget(lane)
        if lane.fence.lane in self._asked:
            self._asked.discard(lane.fence.lane)
            rest = max(rest, self._timing.yield_seconds)
        if is_clean and not rest and self._database.is_sqlite:
            self._give_back(lane)
        else:
            await self._let_rest(lane, rest)

    # giving lanes back

    def forget(self, lane: Lane) -> None:
        """From here on events for this lane go by way of the store."""
        lane.release()
        self.idle.pop(lane, None)
        if self._held.get(lane.fence.lane) is lane:
            del self._held[lane.fence.lane]

    def drop(self, lane: Lane) -> None:
        """End a lane from outside, even one whose task has not begun."""
        self.forget(lane)
        if lane.task is not None:
            lane.task.cancel()

    def _give_back(self, lane: Lane) -> None:
        """Release a lane that has nothing, together with others, and remember that it is clean."""
        self._releasing.add(lane.fence.lane)
        self._asleep.pop(lane.fence.lane, None)
        if not self._done:
            asyncio.get_running_loop().call_later(TOGETHER_SECONDS, self._give_all_back)
        self._done.append((lane.fence, lane.sent_with))

    def _give_all_back(self) -> None:
        done, self._done = self._done, []
        asyncio.ensure_future(self._release_clean(done))  # noqa: RUF006 (the leases expire if it fails)

    async def _release_clean(self, done: Sequence[tuple[Fence, str]]) -> None:
        released = await self._release([fence for fence, _ in done], clean=True)
        for fence, sent_with in done:
            name = fence.lane
            self._releasing.discard(name)
            if name in self._wanted:
                self._wake.set()
            if fence not in released or name in self._held or self._backpressure.queued_in(name):
                continue
            if len(self._clean) >= MAX_CLEAN:
                del self._clean[next(iter(self._clean))]
            if sent_with != MERGED:
                self._clean[name] = fence.number, sys.intern(sent_with)  # a token's: it is the same for many lanes

    async def _let_rest(self, lane: Lane, rest: float) -> None:
        name = lane.fence.lane
        if lane.is_roused and lane.rests_for == "absent":
            rest = 0.0
        if rest:
            if len(self._asleep) >= MAX_ASLEEP:
                del self._asleep[next(iter(self._asleep))]
            timing = self._timing
            pause = timing.absent_wake_seconds if lane.rests_for == "absent" else timing.wake_seconds
            self._asleep[name] = time.monotonic() + pause
        else:
            self._asleep.pop(name, None)
        self._releasing.add(name)
        try:
            await self._release([lane.fence], rest)
        finally:
            self._releasing.discard(name)
        if lane.rests_for == "absent" and self._deliveries.awaited(name):  # callers who came too late to be told
            self.want(name)
        if name in self._wanted:
            self._wake.set()

    async def _release(self, fences: Sequence[Fence], rest: float = 0.0, *, clean: bool = False) -> set[Fence]:
        """Returns those that were given back. `clean`: there is nothing to claim them for."""
        with contextlib.suppress(Exception):  # else the leases expire
            unsettled = await self._unsettled({fence.lane for fence in fences})
            fences = [fence for fence in fences if fence.lane not in unsettled]
            await self._database.run(
                lambda connection: leases.release(connection, fences, int(rest * 1000)), alone=True, lingers=clean
            )
            if not (rest or clean):
                self._wake.set()
            return set(fences)
        return set()

    async def release_all(self) -> None:
        """This process ends. With an outcome that is not written the leases run out instead: all is in doubt."""
        if not await self._unsettled(self._write_queue.unsettled_lanes()):
            with contextlib.suppress(Exception):
                await self._database.run(lambda connection: leases.release_all(connection, self.owner), alone=True)

    async def _unsettled(self, names: set[str]) -> set[str]:
        """Those of these lanes, which send nothing any more, with an outcome that the store has refused to take.

        Without the lane the outcome is void, and the event would be sent once more without a doubt. So the lease is
        kept until the outcome is written; the lane is a stray one then.
        """
        if not self._write_queue.unsettled_lanes() & names:
            return set()
        with contextlib.suppress(Exception):
            await self._database.run(lambda connection: None)  # outcomes that were merely queued are written by then
        return self._write_queue.unsettled_lanes() & names

    def end_idle(self) -> None:
        """End the lanes that have been idle for long."""
        long_ago = time.monotonic() - self._timing.idle_seconds
        for lane in list(self.idle):
            if not lane.end_if_idle(long_ago):
                break

    def _end_longest_idle(self, number: int) -> int:
        """Returns how many ended."""
        ended = 0
        for lane in list(islice(self.idle, max(0, number))):
            ended += lane.end_if_idle(math.inf)
        return ended

    async def _make_room(self) -> list[str]:
        """Release lanes that send nothing; returns the accounts that may claim no more of them.

        A thousand rooms of one caller must not hold up others, nor one more room of the same caller.
        """
        paused = set(self._limits.paused(PAUSED_SECONDS))
        resting: dict[str, list[Fence]] = defaultdict(list)
        for lane in self:
            if lane.account in paused and not lane.at_work:
                self.drop(lane)
                resting[lane.account].append(lane.fence)
        for account, fences in resting.items():
            rest = min(self._limits.pause_of(account), self._timing.max_rest)
            asyncio.ensure_future(self._release(fences, rest))  # noqa: RUF006 (the leases expire if it fails)
        self._end_longest_idle(len(self._held) - self._bounds.lanes // 2)
        held = Counter(lane.account for lane in self._held.values())
        share = share_of_lanes(held, self._bounds.lanes)
        many = [account for account, number in held.items() if number > share and account not in paused]
        if many:
            await self._rotate(many)
        return [*paused, *many]

    async def _rotate(self, accounts: Sequence[str]) -> None:
        """In accounts with too many lanes, release those that were served for longest if other lanes of theirs wait."""
        now = time.monotonic()
        if now < self._rotated_at + ROTATE_SECONDS:
            return
        self._rotated_at = now
        waiting = await self._database.read(lambda connection: leases.free(connection, accounts, ROTATED))
        fences: list[Fence] = []
        for lane in self:  # in the order of their claims
            if len(fences) >= waiting:
                break
            if lane.account in accounts and lane.has_more and lane.had_turn and not lane.at_work:
                self.drop(lane)
                fences.append(lane.fence)
        if fences:
            await self._release(fences)
