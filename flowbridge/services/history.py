"""The second use case: reading what is in rooms, and what happens in them, on a caller's behalf.

Members, messages and state are the homeserver's own answers. `initialSync` and `events`, which few homeservers still
have, are always made of `/sync` and `/messages`: the same answer in front of each. The tokens are the homeserver's own.
Nothing here joins a room.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from flowbridge.auth import scopes
from flowbridge.auth.callers import Callers, Credential
from flowbridge.auth.room_access import RoomAccess
from flowbridge.errors import BadRequest, Errcode, Forbidden, HomeserverError
from flowbridge.homeserver import Homeserver, identifiers, large_json, paths
from flowbridge.homeserver.client import READERS
from flowbridge.homeserver.sync import (
    NOTHING,
    ROOMS_ALONE,
    Batch,
    Json,
    Page,
    SyncClient,
    invitations,
    objects,
    section,
    unmarked,
)
from flowbridge.limits import peer
from flowbridge.limits.cache import Cache
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Caller
from flowbridge.services import legacy_events

T = TypeVar("T")
Shown = Callable[..., Awaitable[Json]]  # user, room and event; fresh: see Devices.shown

ENCRYPTED = "m.room.encrypted"

SNAPSHOT_SECONDS = 120.0  # for all state of all rooms
MAX_TIMELINE = 100  # events of a room in one sync: what Synapse gives at most
PAGE = 500  # events of a room in one page
MAX_MISSED = 10_000  # events of a room that one answer may catch up on
EVENT_BYTES = 1_000  # about
MAX_POLLS = 200  # that wait for events at once; each holds a connection to the homeserver
MAX_POLLS_OF_ONE = 25
MAX_READS = READERS - MAX_POLLS  # other reads at once
MAX_READS_OF_ONE = MAX_READS // 4
MAX_SNAPSHOTS = 4  # at once: each is held in memory
MAX_SNAPSHOTS_OF_ONE = 2
LOOKS_AT_ONCE = 16  # into the room directory, for one snapshot
VISIBILITY_SECONDS = 60.0  # how long it is remembered whether a room is in the directory
MAX_VISIBILITIES = 10_000

_NAMES: Json = {
    "room": {
        "timeline": {"limit": 1},  # a room without any event would be left out
        "state": {"types": ["m.room.name", "m.room.canonical_alias", "m.room.encryption"]},
        "ephemeral": NOTHING,
        "account_data": NOTHING,
    },
    **ROOMS_ALONE,
}


class History:
    """Every answer is JSON in bytes. Every method raises MatrixError."""

    def __init__(
        self,
        callers: Callers,
        room_access: RoomAccess,
        homeserver: Homeserver,
        *,
        encrypted_rooms: str = "refuse",
        shown: Shown | None = None,
    ) -> None:
        self._callers = callers
        self._room_access = room_access
        self._homeserver = homeserver
        self._encrypted_rooms = encrypted_rooms
        self._shown = shown  # an event of a room, as a user reads it: decrypted, perhaps
        self._snapshots = Limiter("snapshots of rooms that are being made", MAX_SNAPSHOTS, MAX_SNAPSHOTS_OF_ONE)
        self._waiting = Limiter("calls that wait for events", MAX_POLLS, MAX_POLLS_OF_ONE)
        self._reads = Limiter("reads of rooms that are going on", MAX_READS, MAX_READS_OF_ONE)
        self._polls: set[asyncio.Task[Batch]] = set()
        self._is_stopping = False
        self._visibilities = Cache[str, str](MAX_VISIBILITIES, VISIBILITY_SECONDS)

    async def page(
        self, credential: Credential, room: str, what: str, query: Mapping[str, str], *, old: bool = False
    ) -> bytes:
        """The homeserver's own list of a room's members, messages or state; `old`: with the old fields, too."""
        caller, room_id = await self._enter(credential, room)
        body, value = await self._read(caller, paths.room_target(room_id, what, query), token=caller.token)
        decrypted = await self._decrypted(caller, room_id, value) if what == "messages" else value
        if decrypted is value and (not old or not isinstance(value, dict | list)):
            return body
        return await large_json.aside(
            len(body), lambda: large_json.write(legacy_events.page(decrypted) if old else decrypted)
        )

    async def event(self, credential: Credential, room: str, event_id: str) -> Json:
        """One event, as the caller reads it."""
        caller, room_id = await self._enter(credential, room)
        _, value = await self._read(caller, paths.event_target(room_id, event_id), token=caller.token)
        found: Json = (await self._decrypted(caller, room_id, {"chunk": [value]}, fresh=True))["chunk"][0]
        return found

    async def rooms(self, credential: Credential) -> bytes:
        """The rooms that the caller is in, of an API key with rooms those: ids, names and aliases, sorted by name.

        And the rooms that it is invited to, and has not joined, with the inviter of each. Beside them stands what
        FLOWBRIDGE_ENCRYPTED_ROOMS says of the encrypted ones.
        """
        caller = await self._callers.identify(credential)
        async with self._snapshots.turn(peer.who(), SNAPSHOT_SECONDS):
            batch = await self._state(caller, _NAMES)

            def made() -> tuple[list[Json], list[Json]]:
                invited = [invitation.shown() for invitation in invitations(batch.value, caller.user_id)]
                return legacy_events.named_rooms(batch.value), invited

            found, invited = await large_json.aside(batch.size, made)
        if credential.key is not None and credential.key.rooms:
            scope = await self._room_access.scope(caller, credential.key)
            found, invited = ([room for room in rooms if room["room_id"] in scope] for rooms in (found, invited))
        answer = {"rooms": found, "invitations": invited, "encrypted_rooms": self._encrypted_rooms}
        return large_json.write(answer)

    async def snapshot(self, credential: Credential, limit: int, *, archived: bool = False) -> bytes:
        """All rooms that the caller is in or invited to, with their state and `limit` newest events.

        `archived`: and those that it has left.
        """
        scopes.permit_reading(credential.key)
        caller = await self._callers.identify(credential)
        filter_ = {"room": {"timeline": {"limit": min(limit, MAX_TIMELINE)}, "include_leave": archived}}
        async with self._snapshots.turn(peer.who(), SNAPSHOT_SECONDS):
            batch = await self._state(caller, filter_)
            rooms = legacy_events.rooms_of(batch.value)
            visibilities = await self._visibility(caller, [room_id for _, room_id in rooms])
            for kind, room_id in rooms:
                timeline = section(batch.value, "rooms", kind, room_id, "timeline")
                decrypted = await self._decrypted(caller, room_id, {"chunk": objects(timeline, "events")})
                timeline["events"] = decrypted["chunk"]

            def made() -> bytes:
                return large_json.write(legacy_events.snapshot(batch.value, caller.user_id, visibilities), levels=4)

            return await large_json.aside(batch.size, made)

    async def room_snapshot(self, credential: Credential, room: str, limit: int) -> bytes:
        """One room: its state and newest events, also when the caller has left it, or when everybody may read it.

        A sync says how the caller stands to it. The rest is asked for by name: in a sync for one room alone Synapse
        leaves the m.room.create of room version 12 out.
        """
        caller, room_id = await self._enter(credential, room)
        only = {"rooms": [room_id], "timeline": {"limit": 1}, "state": NOTHING, "include_leave": True}
        async with self._snapshots.turn(peer.who(), SNAPSHOT_SECONDS):
            sync = (await self._state(caller, {"room": only})).value
            kind = next((kind for kind, found in legacy_events.rooms_of(sync) if found == room_id), "")
            visibility = (await self._visibility(caller, [room_id]))[room_id]
            if kind == "invite":
                invited = legacy_events.room(sync, caller.user_id, kind, room_id)
                return large_json.write({**invited, "visibility": visibility})
            body, state = await self._read(caller, paths.room_target(room_id, "state", {}), token=caller.token)
            newest = await self._messages(caller, room_id, sync["next_batch"], limit=limit)
            decrypted = await self._decrypted(caller, room_id, {"chunk": newest.events})
            newest = replace(newest, events=decrypted["chunk"])

            def made() -> bytes:
                return large_json.write(legacy_events.room_snapshot(sync, kind, room_id, state, newest, visibility))

            return await large_json.aside(len(body) + newest.size, made)

    async def events(self, credential: Credential, since: str, seconds: float, room: str = "") -> bytes:
        """What happened after the token `since` ("": now), in one room or in all; waits for it so many seconds.

        Raises BadRequest for what is not a token, and when too much has happened since then.
        """
        if room:
            caller, room_id = await self._enter(credential, room)
            if not await self._asked(caller, self._homeserver.is_joined(caller.token, room_id, caller.user_id)):
                raise Forbidden("only a member of a room can listen to it")
        else:
            scopes.permit_reading(credential.key)
            caller, room_id = await self._callers.identify(credential), ""
        ends = time.monotonic() + seconds
        start = identifiers.stream_token(since)
        if not start:
            start = (await self._state(caller, {"room": {"rooms": []}, **ROOMS_ALONE})).next_batch
        end, size, chunk = start, 0, list[Json]()
        while not chunk and not self._is_stopping:
            batch = await self._poll(caller, _listening(room_id), end, max(0.0, ends - time.monotonic()))
            whole = await self._missed(caller, batch, end)
            size = batch.size + EVENT_BYTES * sum(map(len, whole.values()))
            chunk = await large_json.aside(size, legacy_events.chunk, batch.value, caller.user_id, whole)
            chunk = (await self._decrypted(caller, "", {"chunk": chunk}))["chunk"]
            before, end = end, batch.next_batch
            if end == before or time.monotonic() >= ends:
                break
        return await large_json.aside(size, large_json.write, {"chunk": chunk, "start": start, "end": end})

    async def _decrypted(self, caller: Caller, room_id: str, page: Any, *, fresh: bool = False) -> Any:
        """A page as the bot's callers read it. `room_id`: "" where each event names its own. `fresh`: the keys, too."""
        chunk = objects(page, "chunk")
        if any("flowbridge" in event for event in chunk):
            chunk = [unmarked(event) for event in chunk]
            page = {**page, "chunk": chunk}
        if self._shown is None or not caller.bot or not any(event.get("type") == ENCRYPTED for event in chunk):
            return page
        show = partial(self._shown, fresh=True) if fresh else self._shown
        shown = [show(caller.user_id, room_id or str(event.get("room_id")), event) for event in chunk]
        return {**page, "chunk": await asyncio.gather(*shown)}  # together: their commits are one

    def stop(self) -> None:
        """The bridge stops: answer every caller that waits for events."""
        self._is_stopping = True
        for poll in self._polls:
            poll.cancel()

    async def _enter(self, credential: Credential, room: str) -> tuple[Caller, str]:
        """Who reads, and the id of the room."""
        return await self._room_access.enter(credential, room, partial(scopes.permit_reading, credential.key))

    async def _state(self, caller: Caller, filter_: Json) -> Batch:
        """How things stand: a sync without a `since`."""
        return await self._client(caller).sync(caller.token, filter_, patience=SNAPSHOT_SECONDS)

    async def _poll(self, caller: Caller, filter_: Json, since: str, seconds: float) -> Batch:
        """A sync that waits; nothing new when the bridge stops meanwhile."""
        with self._waiting.hold(peer.who()):
            client, patience = SyncClient(self._homeserver.read), self._homeserver.deadline
            asking = client.sync(caller.token, filter_, since=since, wait=seconds, patience=patience, online=True)
            poll = asyncio.create_task(self._asked(caller, asking))
            self._polls.add(poll)
            try:
                return await poll
            except asyncio.CancelledError:
                if not self._is_stopping:
                    raise
                return Batch({"next_batch": since}, since)
            finally:
                self._polls.discard(poll)

    async def _missed(self, caller: Caller, batch: Batch, since: str) -> dict[str, list[Json]]:
        """All events since then of the rooms whose timeline was cut short, by room id.

        From the newest one backwards, and not from where the timeline begins: the timeline of a room that was just
        joined begins before `since`.
        """
        whole: dict[str, list[Json]] = {}
        for kind, room_id in legacy_events.rooms_of(batch.value):
            if section(batch.value, "rooms", kind, room_id, "timeline").get("limited"):
                try:
                    whole[room_id] = await self._between(caller, room_id, since, batch.next_batch)
                except HomeserverError as error:
                    if error.status not in (403, 404):  # out of the room by now: there is no more than the timeline
                        raise
        return whole

    async def _between(self, caller: Caller, room_id: str, since: str, until: str) -> list[Json]:
        found: list[Json] = []
        before = until
        while len(found) <= MAX_MISSED:
            page = await self._messages(caller, room_id, before, since, limit=PAGE)
            found += page.events
            if not page.end or page.end == before:
                return found[::-1]
            before = page.end
        raise BadRequest(
            f"more than {MAX_MISSED} events since this token in {room_id}: get all state (initialSync), "
            "and go on from its `end`"
        )

    async def _visibility(self, caller: Caller, room_ids: list[str]) -> dict[str, str]:
        """ "public" for the rooms that are in the room directory, "private" for the others."""
        looks = asyncio.Semaphore(LOOKS_AT_ONCE)

        async def look(room_id: str) -> str:
            if known := self._visibilities.get(room_id):
                return known
            async with looks:
                try:
                    found = "public" if await self._homeserver.is_public(caller.token, room_id) else "private"
                except HomeserverError:  # it does not know the room, or has no directory
                    found = "private"
            return self._visibilities.put(room_id, found)

        return dict(zip(room_ids, await asyncio.gather(*map(look, room_ids)), strict=True))

    async def _messages(self, caller: Caller, room_id: str, before: str, since: str = "", *, limit: int) -> Page:
        """Up to `limit` events, newest first."""
        client = self._client(caller)
        return await client.messages(caller.token, room_id, since=before, until=since, backwards=True, limit=limit)

    def _client(self, caller: Caller) -> SyncClient:
        return SyncClient(partial(self._read, caller))

    async def _read(
        self, caller: Caller, target: str, *, token: str, seconds: float | None = None, limit: int | None = None
    ) -> tuple[bytes, Any]:
        """As `Homeserver.read`, within the caller's share of the reads."""
        async with self._reads.turn(peer.who(), self._homeserver.deadline):
            asking = self._homeserver.read(target, token=token, seconds=seconds, limit=limit)
            return await self._asked(caller, asking)

    async def _asked(self, caller: Caller, asking: Awaitable[T]) -> T:
        try:
            return await asking
        except HomeserverError as error:
            if error.status == 400 and error.errcode == Errcode.UNKNOWN:  # Synapse, for what is not a token
                raise BadRequest(error.error) from None
            raise self._callers.refused(caller, error) from None


def _listening(room_id: str) -> Json:
    """A filter: all that happens, or what happens in one room."""
    room: Json = {"timeline": {"limit": MAX_TIMELINE}, "state": NOTHING}
    return {"room": {**room, "rooms": [room_id]}, **ROOMS_ALONE} if room_id else {"room": room}
