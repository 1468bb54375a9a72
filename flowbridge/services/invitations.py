"""The bot's invitations: it takes those that FLOWBRIDGE_AUTO_JOIN names, and events that wait for it in a room go out.

The homeserver keeps invitations, so nothing of them is stored here: after a restart they are read again. Nobody waits
for an answer, and strangers decide how many there are: joins take turns among inviters, rest after each, and are given
up in the end.
"""

import asyncio
import contextlib
import heapq
import itertools
import math
import secrets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from flowbridge import log
from flowbridge.auth.bot import Bot
from flowbridge.auth.callers import Callers
from flowbridge.errors import MatrixError, TooLarge
from flowbridge.homeserver import Homeserver, answers, large_json, paths
from flowbridge.homeserver.sync import (
    NOTHING,
    ROOMS_ALONE,
    Batch,
    Invitation,
    Json,
    SyncClient,
    invitations,
    listed,
    section,
)
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import ignore_result
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.store import Database, resolved
from flowbridge.store.engine import reason

Joined = Callable[[str, str], Awaitable[None]]  # user and room

MAX_INVITATIONS: Final = 10_000  # that wait at once, a tenth of them one inviter's; the others are read again later
JOIN_SECONDS: Final = 60.0  # a room of another server may take a minute
PATIENCE_SECONDS: Final = 60.0  # for a first answer with thousands of invitations
OWN_AT_ONCE: Final = 4  # joins for inviters of the bot's own server …
OTHERS_AT_ONCE: Final = 2  # … and for all others, whose servers may not answer
REST: Final = 3.0  # an inviter's next join waits for so many times what the last took: a flood costs a quarter
LOOK_SHARE: Final = 20  # the next look waits for so many times what the last took: it may be one at a thousand rooms
MAX_PAUSE: Final = 30.0  # between two looks, also while the homeserver does not answer well
REFUSED_SECONDS: Final = 30.0  # after the homeserver refused the bot itself
MAX_LOGGED: Final = 100  # invitations of one look that have a line each


def takes(auto_join: tuple[str, ...], inviter: str, user_id: str) -> bool:
    """Whether a user's invitation is taken. `auto_join`: the setting; `user_id`: the bot."""
    server = _server_of(inviter)
    if "all" in auto_join or inviter in auto_join:
        return True
    if "own" in auto_join and server and server == _server_of(user_id):
        return True
    return any(server == named.lower() for named in auto_join if not named.startswith("@"))


def _server_of(user_id: str) -> str:
    return user_id.partition(":")[2].lower()


@dataclass(slots=True, eq=False)
class _Join:
    """A join that is still to be made. `turn`: whose turn it takes, a user of the own server or another server."""

    invitation: Invitation
    turn: str
    is_own: bool
    failures: int = 0
    is_over: bool = False


class Invitations:
    """`joined`: called with the bot and each room that it has joined, by whatever way."""

    def __init__(
        self,
        auto_join: tuple[str, ...],
        bot: Bot,
        callers: Callers,
        homeserver: Homeserver,
        database: Database,
        *,
        joined: Joined,
        timing: Timing = Timing(),
        max_invitations: int = MAX_INVITATIONS,
    ) -> None:
        self._auto_join = auto_join
        self._bot = bot
        self._callers = callers
        self._homeserver = homeserver
        self._database = database
        self._joined = joined
        self._timing = timing
        self._max = max_invitations
        self._owner = secrets.token_hex(8)
        self._user_id = ""
        self._since = ""
        self._asked_since: str | None = None  # of the look before
        self._told: set[str] = set()  # rooms whose join was told since `_since` moved
        self._joins: dict[str, _Join] = {}  # by room
        self._turns: OrderedDict[str, deque[_Join]] = OrderedDict()
        self._resting: dict[str, float] = {}  # turns in use, or that rest: until when, by the loop's clock
        self._later: list[tuple[float, int, _Join]] = []  # a heap of those that failed
        self._numbers = itertools.count()
        self._at_once = {True: 0, False: 0}  # joins in flight, by `is_own`
        self._not_before = 0.0  # no join begins earlier: the homeserver limits the bot
        self._given_up = Cache[str, None](max_invitations)
        self._has_more = False
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """For ever; at the end another replica may go on at once."""
        try:
            await self._run()
        finally:
            if self._user_id and not self._database.is_sqlite:
                work = partial(resolved.release, name=_claim_of(self._user_id), owner=self._owner)
                self._database.run(work).add_done_callback(ignore_result)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._dispatch(tasks))
            loop, usual, failures = asyncio.get_running_loop(), self._timing.invitation_seconds, 0
            pause = usual
            while True:
                await asyncio.sleep(pause)
                began = loop.time()
                try:
                    await self._look()
                    failures, pause = 0, max(usual, min(LOOK_SHARE * (loop.time() - began), MAX_PAUSE))
                except Exception as error:
                    if not failures:
                        why = error.error if isinstance(error, MatrixError) else reason(error)
                        log.warning("invitations_unknown", error=why[:300])
                    failures += 1
                    pause = max(usual, min(usual * 2.0 ** min(failures, 10), MAX_PAUSE))

    # what the homeserver has

    async def _look(self) -> None:
        bot = await self._bot.caller()
        if bot is None:
            return
        is_ours = await self._is_ours(bot)
        if not is_ours or bot.user_id != self._user_id:
            self._begin_again(bot.user_id)
        if not is_ours:
            return
        if self._has_more and len(self._joins) <= self._max // 20:
            self._since, self._has_more = "", False
        with self._callers.as_(bot):
            batch = await self._read(bot)
        await self._learn(batch)

    async def _is_ours(self, bot: Caller) -> bool:
        """Whether this process looks after the invitations: one of several replicas does."""
        if self._database.is_sqlite:
            return True
        lease = int(self._timing.invitation_lease_seconds * 1000)
        work = partial(resolved.claim, name=_claim_of(bot.user_id), owner=self._owner, lease_ms=lease)
        return await self._database.run(work, alone=True)

    async def _read(self, bot: Caller) -> Batch:
        """What is new. A look every few seconds, and no long poll.

        Synapse computes a waiting sync again with each event in the bot's rooms: with one beside them, sends to 60
        rooms went down from 16 to 9 a second.
        """
        sync = partial(SyncClient(self._homeserver.read).sync, bot.token, patience=PATIENCE_SECONDS)
        if self._since:
            own = {"limit": 1, "types": ["m.room.member"], "senders": [bot.user_id], "lazy_load_members": True}
            return await sync(_filter(own), since=self._since)
        try:
            return await sync(_filter({**NOTHING, "limit": 1}))
        except TooLarge as error:
            log.error("invitations_unreadable", error=error.error, hint="those that come from now on are read")
            return await sync({"room": {"rooms": []}, **ROOMS_ALONE})

    async def _learn(self, batch: Batch) -> None:
        is_repeated, is_first = self._since == self._asked_since, not self._since
        self._asked_since = self._since
        if not is_repeated:
            self._told.clear()
        # Whoever goes on from a batch tells the homeserver to delete the device's messages before it: those of another
        # client with the bot's token, which has not read them yet.
        if not listed(batch.value, "to_device"):
            self._since = batch.next_batch
        user_id = self._user_id
        found, joined = await large_json.aside(
            batch.size, lambda: (invitations(batch.value, user_id), _joined_rooms(batch.value, user_id))
        )
        for room_id in (*joined, *section(batch.value, "rooms", "leave")):
            self._drop(room_id)
        for room_id in joined:
            if room_id not in self._told:
                self._told.add(room_id)
                await self._joined(user_id, room_id)
        known = {*self._joins, *self._told} if is_repeated else self._joins.keys()
        given_up = is_first or is_repeated
        self._take([each for each in found if each.room_id not in known], given_up=given_up, quiet=is_repeated)

    def _take(self, found: list[Invitation], *, given_up: bool, quiet: bool) -> None:
        """Queue the invitations that are to be taken. `given_up`: they may be those that were given up before.

        `quiet`: those that are not taken were logged before.
        """
        left = 0
        for invitation in found:
            room_id, inviter = invitation.room_id, invitation.inviter
            if not takes(self._auto_join, inviter, self._user_id):
                left += 1
                if left <= MAX_LOGGED and not quiet:
                    hint = f"FLOWBRIDGE_AUTO_JOIN does not take it: POST /join/{room_id}"
                    log.info("invitation_left", room=room_id, inviter=inviter, user=self._user_id, hint=hint)
            elif not (given_up and room_id in self._given_up):
                self._queue(invitation)
        if left > MAX_LOGGED and not quiet:
            log.info("invitations_left", more=left - MAX_LOGGED, user=self._user_id)
        self._wake.set()

    def _queue(self, invitation: Invitation) -> None:
        is_own = _server_of(invitation.inviter) == _server_of(self._user_id)
        turn = invitation.inviter if is_own else _server_of(invitation.inviter)
        queue = self._turns.setdefault(turn, deque())
        if len(self._joins) >= self._max or len(queue) >= self._max // 10:
            self._has_more = True
            return
        join = self._joins[invitation.room_id] = _Join(invitation, turn, is_own)
        queue.append(join)

    def _drop(self, room_id: str) -> None:
        """The bot is in this room by now, or is not invited any more."""
        self._given_up.pop(room_id)
        if (join := self._joins.pop(room_id, None)) is not None:
            join.is_over = True

    def _begin_again(self, user_id: str) -> None:
        """Another process looks after the invitations, or the bot is another account."""
        for room_id in list(self._joins):
            self._drop(room_id)
        if user_id != self._user_id:
            self._given_up.clear()
        self._user_id, self._since, self._asked_since, self._has_more = user_id, "", None, False

    # joining

    async def _dispatch(self, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = loop.time()
            while self._later and self._later[0][0] <= now:
                join = heapq.heappop(self._later)[2]
                self._turns.setdefault(join.turn, deque()).append(join)
            while now >= self._not_before and (next_ := self._next(now)) is not None:
                self._at_once[next_.is_own] += 1
                self._resting[next_.turn] = math.inf
                tasks.create_task(self._join(next_))
            times = [at for at in (self._not_before, *self._resting.values()) if at > now]
            times += [self._later[0][0]] if self._later else []
            until = min(times, default=math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until if until < math.inf else None):
                    await self._wake.wait()

    def _next(self, now: float) -> _Join | None:
        """The join whose turn it is: inviters take turns."""
        for turn in list(self._turns):
            queue = self._turns[turn]
            while queue and queue[0].is_over:
                queue.popleft()
            if not queue:
                del self._turns[turn]
                continue
            is_free = self._at_once[queue[0].is_own] < (OWN_AT_ONCE if queue[0].is_own else OTHERS_AT_ONCE)
            if not is_free or self._resting.get(turn, 0.0) > now:
                continue
            self._turns.move_to_end(turn)
            return queue.popleft()
        return None

    async def _join(self, join: _Join) -> None:
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        try:
            await self._try(join)
        except Exception as error:  # a fault in one must not end the others
            log.error("join_failed", exc_info=error, room=join.invitation.room_id)
            self._give_up(join)
        finally:
            now = loop.time()
            self._at_once[join.is_own] -= 1
            self._resting = {turn: at for turn, at in self._resting.items() if at > now}
            self._resting[join.turn] = now + REST * (now - began)
            self._wake.set()

    async def _try(self, join: _Join) -> None:
        room_id, inviter, user_id = join.invitation.room_id, join.invitation.inviter, self._user_id
        try:
            bot = await self._bot.caller()
            if bot is None or bot.user_id != user_id:
                return
            with self._callers.as_(bot):
                answer = await self._homeserver.call(
                    "POST", paths.join_target(room_id), token=bot.token, body=b"{}", deadline=JOIN_SECONDS
                )
                answers.success(answer)
        except MatrixError as error:
            self._failed(join, error)
            return
        log.info("invitation_taken", room=room_id, inviter=inviter, user=user_id)
        self._drop(room_id)
        self._told.add(room_id)
        await self._joined(user_id, room_id)

    def _failed(self, join: _Join, error: MatrixError) -> None:
        verdict, now = answers.refused(error), asyncio.get_running_loop().time()
        pauses, pause = self._timing.join_pauses, 0.0
        if verdict.kind == "slow":
            pause = verdict.pause_ms / 1000
            self._not_before = now + pause
        elif verdict.kind in ("token", "account"):
            pause = REFUSED_SECONDS
            self._not_before = now + pause
        elif verdict.kind == "again" and join.failures < len(pauses):
            pause = pauses[join.failures]
            join.failures += 1
        log.warning(
            "invitation_failed",
            room=join.invitation.room_id,
            inviter=join.invitation.inviter,
            user=self._user_id,
            errcode=str(error.errcode),
            error=error.error[:300],
            again_in=pause or None,
        )
        if pause:
            heapq.heappush(self._later, (now + pause, next(self._numbers), join))
        else:
            self._give_up(join)

    def _give_up(self, join: _Join) -> None:
        """It is not tried again before the next restart, or another invitation to this room."""
        self._drop(join.invitation.room_id)
        self._given_up.put(join.invitation.room_id, None)


def _claim_of(user_id: str) -> str:
    """The name under which one of several replicas looks after a bot's invitations."""
    return f"invitations|{user_id}"


def _filter(timeline: Json) -> Json:
    room = {
        "timeline": timeline,
        "state": {**NOTHING, "lazy_load_members": True},
        "ephemeral": NOTHING,
        "account_data": NOTHING,
    }
    return {"room": room, **ROOMS_ALONE}


def _joined_rooms(sync: Json, user_id: str) -> list[str]:
    """The rooms of a sync that the user has joined since the one before."""
    found = []
    for room_id, room in section(sync, "rooms", "join").items():
        for event in listed(room, "timeline"):
            is_own = event.get("type") == "m.room.member" and event.get("state_key") == user_id
            before = section(event, "unsigned", "prev_content").get("membership")
            if is_own and section(event, "content").get("membership") == "join" and before != "join":
                found.append(room_id)
    return found
