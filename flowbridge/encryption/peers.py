"""The devices of other users, followed: asked for once, and again when a sync says that they have changed."""

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

from flowbridge.encryption import complaints
from flowbridge.encryption.identities import UserKeys, of_answer
from flowbridge.encryption.key_server import QUERY_USERS, KeyServer
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.limits.cache import Cache
from flowbridge.limits.tasks import Once
from flowbridge.store import crypto
from flowbridge.store.crypto import Changes, StoredUser

MAX_CACHED = 50_000  # devices and users that are kept in memory, some 500 bytes each
MAX_OUTDATED = 50_000  # users of whom memory has that they have changed; the store has it of all that are followed
MAX_FAILED = 5_000
TURN = 20  # users that are read from the store before other tasks have their turn
MAX_LOGGED = 5  # faults of one answer that are logged
FAILED_SECONDS = 60.0  # for which a server that did not answer is not asked again: each question may take 10 s


class Peers:
    """`version`: another number whenever any user's devices may be other ones than before."""

    def __init__(self, device: OwnDevice, server: KeyServer) -> None:
        self._device = device
        self._server = server
        self._cache: Cache[str, UserKeys] = Cache(MAX_CACHED)
        self._asking = Once[frozenset[str], None]()
        self._outdated: dict[str, int] = {}  # user → how often it was said that its devices have changed
        self._changes = 0
        self._floods = 0  # how often it was forgotten which have changed
        self._failed: Cache[str, bool] = Cache(MAX_FAILED, FAILED_SECONDS)
        self.version = 0

    async def load(self) -> None:
        """What was outdated when the last process ended still is."""
        found = await self._device.database.read(lambda connection: crypto.users(connection, self._device.account_id))
        self.mark(user.user_id for user in found if user.outdated)

    async def known(self, users: Collection[str]) -> dict[str, UserKeys]:
        """What is known of these users, without a question to the homeserver."""
        found = {user: keys for user in users if (keys := self._cache.get(user)) is not None}
        missing = [user for user in users if user not in found]
        if missing:
            account = self._device.account_id
            stored = await self._device.database.read(lambda connection: crypto.users(connection, account, missing))
            for number, row in enumerate(stored):
                if row.sealed is not None:
                    keys = UserKeys.from_kept(row.user_id, self._device.seal.open(row.sealed))
                    found[row.user_id] = self._keep(keys)
                    if row.outdated and row.user_id not in self._outdated:
                        self._changes += 1
                        self._outdated[row.user_id] = self._changes
                if number % TURN == TURN - 1:
                    await asyncio.sleep(0)
        return found

    def _keep(self, keys: UserKeys) -> UserKeys:
        return self._cache.put(keys.user_id, keys, weight=1 + len(keys.devices))

    async def of(self, users: Collection[str]) -> dict[str, UserKeys]:
        """The devices of these users, up to date as far as syncs have told. Raises MatrixError, StoreUnavailable.

        A user whose own server does not answer has the devices that are known of it, and is asked for again later.
        """
        found = await self.known(users)
        wanted = sorted(
            user for user in users if (user not in found or user in self._outdated) and user not in self._failed
        )
        for start in range(0, len(wanted), QUERY_USERS):
            piece = frozenset(wanted[start : start + QUERY_USERS])
            await self._asking.get(piece, lambda piece=piece: self._ask(piece))  # type: ignore[misc]
        return await self.known(users) if wanted else found

    def mark(self, users: Iterable[str]) -> None:
        """Their devices have changed."""
        for user in users:
            self._failed.pop(user)
            self._changes += 1
            self._outdated[user] = self._changes
        self.version += 1

    def marked(self) -> None:
        """The store has it, too: of a flood memory need not."""
        if len(self._outdated) > MAX_OUTDATED:
            self._outdated.clear()
            self._cache.clear()
            self._floods += 1

    def forget(self, users: Iterable[str]) -> None:
        """They share no room with the account any more: nothing is said of their devices from now on."""
        for user in users:
            self._cache.pop(user)
            self._outdated.pop(user, None)
        self.version += 1

    async def _ask(self, users: frozenset[str]) -> None:
        before = await self.known(users)
        marks, floods = {user: self._outdated.get(user) for user in users}, self._floods
        answer = await self._server.query(users)
        failed = _failed_servers(answer)
        changes, found, wrong = Changes(), {}, list[str]()
        for user in sorted(users):
            if user.partition(":")[2] in failed:
                self._failed.put(user, True)
                continue
            # A user's 2,000 devices, with two signatures each, take half a second.
            keys, faults = await asyncio.to_thread(of_answer, answer, user, before.get(user))
            wrong += faults
            found[user] = keys
            # Else it has changed, or may have, while it was asked for.
            is_current = self._outdated.get(user) == marks[user] and self._floods == floods
            changes.users.append(StoredUser(user, self._device.seal.close(keys.kept()), int(not is_current)))
        if failed:
            complaints.warn("keys_of_server_unknown", servers=sorted(failed)[:MAX_LOGGED])
        for fault in wrong[:MAX_LOGGED]:
            complaints.warn("keys_not_taken", reason=fault)
        await self._device.commit(changes)
        for user, keys in found.items():
            self._keep(keys)
            if self._outdated.get(user) == marks[user]:
                self._outdated.pop(user, None)
            if before.get(user) != keys:
                self.version += 1


def _failed_servers(answer: dict[str, Any]) -> set[str]:
    failures = answer.get("failures")
    return {name for name in failures if isinstance(name, str)} if isinstance(failures, dict) else set()
