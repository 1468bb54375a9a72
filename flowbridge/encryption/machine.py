"""A device at work: what its syncs bring in, what is sent with it, and what it reads.

One object for one device that this process holds; `keeper.py` makes it, and makes another when the lease was lost.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from flowbridge import log
from flowbridge.encryption.backup import KeyBackup
from flowbridge.encryption.channels import Channels
from flowbridge.encryption.identities import is_id
from flowbridge.encryption.inbound import Decrypted, Inbound, Undecryptable
from flowbridge.encryption.key_server import KeyServer
from flowbridge.encryption.outbound import Outbound
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.peers import Peers
from flowbridge.encryption.rooms import CHANGES, Rooms
from flowbridge.encryption.verification import Verifications
from flowbridge.errors import MatrixError
from flowbridge.homeserver.sync import Json, listed, objects, section
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once
from flowbridge.store import crypto
from flowbridge.store.crypto import Changes

T = TypeVar("T")

TURN = 1_000  # names or messages, some 2 ms
UNWEDGE_SECONDS = 3_600.0  # between two new sessions with a device whose messages cannot be read
MAX_UNWEDGED = 10  # at once
MAX_WEDGED = 10_000
SIGNED = "signed_curve25519"


class Machine:
    """`on_rooms`: called with rooms whose settings or readers may have changed; `on_keys`: with (room, session) of keys
    that have come.
    """

    def __init__(
        self,
        device: OwnDevice,
        server: KeyServer,
        on_rooms: Callable[[Collection[str]], object] = lambda _: None,
        on_keys: Callable[[Collection[tuple[str, str]]], object] = lambda _: None,
    ) -> None:
        self._on_keys = on_keys
        self.device = device
        self._on_rooms = on_rooms
        self.server = server
        self.peers = Peers(device, server)
        self.rooms = Rooms(device.database, server)
        self.channels = Channels(device, server)
        self.outbound = Outbound(device, self.channels, self.peers, self.rooms)
        self.inbound = Inbound(device, self.peers)
        self.backup = KeyBackup(device, server)
        self.verifications = Verifications(device, server, self.peers)
        self.synced_at = -1e9  # monotonic: all before it is known
        self._syncing = Once[None, None]()
        self._unwedged: Cache[tuple[str, str], bool] = Cache(MAX_WEDGED, UNWEDGE_SECONDS)
        self._wedged: set[tuple[str, str]] = set()

    async def begin(self) -> None:
        """Publish what the homeserver does not have yet. Raises MatrixError, StoreUnavailable."""
        await self.peers.load()
        if not self.device.secrets.get("published"):
            await self.publish()

    async def publish(self) -> None:
        """The device's keys, with one-time keys."""
        async with self.device.lock:
            await self._stock(0, has_fallback=False, device_keys=True)
            self.device.secrets["published"] = True
            changes = Changes()
            self.device.note_secrets(changes)
            await self.device.commit(changes)

    # syncs

    async def sync(self) -> None:
        """Read what is new for this device, never twice at once: see `fresh`. Raises MatrixError, StoreUnavailable.

        What is asked for again is the rest: the homeserver forgets messages for the device once their `since` is used.
        """
        began = time.monotonic()
        own = self.device
        kept = await own.database.read(partial(crypto.inbox, account=own.account_id))
        value, next_batch = await self.server.sync(FILTER, own.since)
        if not own.since:  # a first sync names no changes: those of before are unknown
            self.rooms.forget_all()
        await self._absorb(value, next_batch, kept)
        self.synced_at = began
        await self._unwedge()
        await self.verifications.handle()

    async def fresh(self, seconds: float) -> None:
        """Know all that the homeserver knew `seconds` ago."""
        wanted = time.monotonic() - seconds
        while self.synced_at < wanted:
            await self._syncing.get(None, self.sync)

    async def _absorb(self, sync: Json, next_batch: str, kept: Sequence[tuple[int, str]]) -> None:
        """Take what a sync brought, and what others have `kept`; a message may have been read before."""
        events = [event for _, sealed in kept for event in self.device.seal.open(sealed)]
        events += listed(sync, "to_device")
        changed_rooms = _changed_rooms(sync)
        self.rooms.changed(changed_rooms)
        self._on_rooms(changed_rooms)
        lists = section(sync, "device_lists")
        changed, left = await _users(lists.get("changed")), await _users(lists.get("left"))
        for names in _some(changed):
            self.peers.mark(names)
            await asyncio.sleep(0)
        self.peers.forget(left)
        changes = Changes(since=next_batch, outdated=changed, left=left - changed, read=[number for number, _ in kept])
        if events:
            await self._take(events, changes)
        else:  # no ratchet moves: sends wait for a sync, and sharing a key with many devices has the lock for long
            await self.device.commit(changes)
        self.peers.marked()
        counts = sync.get("device_one_time_keys_count")
        if isinstance(counts, dict):
            unused = sync.get("device_unused_fallback_key_types")
            has_fallback = SIGNED in unused if isinstance(unused, list) else True
            told = counts.get(SIGNED, 0)
            count = max(0, told) if isinstance(told, int) else 0
            if self._is_short(count, has_fallback=has_fallback):
                async with self.device.lock:
                    await self._stock(count, has_fallback=has_fallback)

    async def _take(self, events: Sequence[Json], changes: Changes) -> None:
        """Read what came for the device, and commit that with the rest of its sync."""
        async with self.device.lock:
            reading = await self.channels.read(events, changes)
            keys = self.inbound.take(reading.received, changes)
            await self.device.commit(changes)
            self.inbound.taken(keys)
            if keys:
                self._on_keys(keys)
            for some in _some(events):
                self.inbound.withheld(some)
                self.verifications.take(some)
                await asyncio.sleep(0)
            self._wedged |= set(itertools.islice(reading.wedged, MAX_WEDGED - len(self._wedged)))

    def _is_short(self, count: int, *, has_fallback: bool) -> bool:
        """Whether `_stock` has anything to do."""
        account = self.device.account
        return bool(
            count < account.most_one_time_keys // 2 or not has_fallback or account.one_time_keys or account.fallback_key
        )

    async def _stock(self, count: int, *, has_fallback: bool, device_keys: bool = False) -> None:
        """Keep half as many one-time keys on the homeserver as the device remembers, and a fallback key.

        They are kept before they are uploaded, and again as uploaded after it: a crash between uploads the same again.
        """
        own = self.device
        account = own.account
        most = account.most_one_time_keys // 2
        waiting = len(account.one_time_keys)
        if count + waiting < most:
            account.generate_one_time_keys(most - count - waiting)
        if not has_fallback and not account.fallback_key:
            account.generate_fallback_key()
        one_time, fallback = account.one_time_keys, account.fallback_key
        if not (one_time or fallback or device_keys):
            return
        changes = Changes()
        own.note_account(changes)
        await own.commit(changes)
        body: Json = {"device_keys": own.keys()} if device_keys else {}
        if one_time:
            body["one_time_keys"] = {f"{SIGNED}:{name}": own.signed_key(key) for name, key in one_time.items()}
        if fallback:
            body["fallback_keys"] = {
                f"{SIGNED}:{name}": own.signed_key(key, fallback=True) for name, key in fallback.items()
            }
        await self.server.upload(body)
        account.mark_published()
        changes = Changes()
        own.note_account(changes)
        await own.commit(changes)

    async def _unwedge(self) -> None:
        """Begin another session with devices whose messages cannot be read any more (specification, 11.12.1.1.1)."""
        wedged = [name for name in self._wedged if name not in self._unwedged][:MAX_UNWEDGED]
        self._wedged.difference_update(wedged)
        if not wedged:
            return
        users = await self.peers.of({user for user, _ in wedged})
        devices = [device for user, key in wedged if user in users and (device := users[user].by_key(key)) is not None]
        for name in wedged:
            self._unwedged.put(name, True)
        try:
            async with self.device.lock:
                await self.channels.send("m.dummy", {device: {} for device in devices}, anew=True)
        except MatrixError as error:
            log.warning("device_unreached", reason=error)

    # events

    async def encrypt(self, room_id: str, type_: str, content: Json, delivery: str) -> bytes | None:
        return await self.outbound.encrypt(room_id, type_, content, delivery)

    async def decrypt(self, room_id: str, event: Json, *, restore: bool = False) -> Decrypted:
        """`restore`: a key that is missing is looked for in the account's key backup. Raises as `Inbound.decrypt`."""
        try:
            return await self.inbound.decrypt(room_id, event)
        except Undecryptable as error:
            session_id = section(event, "content").get("session_id")
            if not (restore and error.waits and is_id(session_id) and await self.backup.fetch(room_id, session_id)):
                raise
        self.inbound.taken({(room_id, session_id)})
        self._on_keys({(room_id, session_id)})
        return await self.inbound.decrypt(room_id, event)


# Of rooms only what changes who reads them, and how they are encrypted; not their whole state, which is asked for when
# a room is sent to.
FILTER: Json = {
    "presence": {"types": []},
    "account_data": {"types": []},
    "room": {
        "state": {"types": sorted(CHANGES)},
        "timeline": {"types": sorted(CHANGES), "limit": 1},
        "ephemeral": {"types": []},
        "account_data": {"types": []},
    },
}


def _changed_rooms(sync: Json) -> Collection[str]:
    """The rooms of a sync in which something happened that encryption has to know of, or may have."""
    found = set()
    rooms = section(sync, "rooms", "join") | section(sync, "rooms", "leave")
    for room_id, room in rooms.items():
        timeline = section(room, "timeline")
        happened = objects(timeline, "events") + listed(room, "state")
        if timeline.get("limited") or any(event.get("type") in CHANGES for event in happened):
            found.add(room_id)
    return found


async def _users(names: object) -> set[str]:
    found: set[str] = set()
    for some in _some(names if isinstance(names, list) else ()):
        found.update(name for name in some if is_id(name))
        await asyncio.sleep(0)
    return found


def _some(items: Iterable[T]) -> Iterator[list[T]]:
    """Of a flood so many at a time that other tasks have their turn within some milliseconds."""
    rest = iter(items)
    while some := list(itertools.islice(rest, TURN)):
        yield some
