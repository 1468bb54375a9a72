"""Callers' tokens: kept encrypted beside their events, found by account, and by nobody without the secret key."""

import asyncio
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from cryptography.fernet import Fernet, InvalidToken

from flowbridge import log
from flowbridge.models import Caller
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import Database, accounts, outbox
from flowbridge.store.journal import Journal

V = TypeVar("V")
Known = tuple[str, str | None, str]  # user id, device id, token

MAX_KNOWN = 10_000
KEEP_SECONDS = 600.0  # for how long a token stays that no queued event needs
NOTE_SECONDS = KEEP_SECONDS / 2
_account_of = lru_cache(MAX_KNOWN)(accounts.account_of)


def cipher(settings: Settings) -> Fernet:
    """The cipher of FLOWBRIDGE_SECRET_KEY, or of a 0600 key file beside the database, made when it is not there."""
    key = settings.secret_key.get_secret_value() if settings.secret_key else _from_file(settings)
    try:
        return Fernet(key)
    except ValueError:
        raise SettingsError(
            "FLOWBRIDGE_SECRET_KEY: a Fernet key is 32 bytes in URL-safe base64; "
            "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'` makes one"
        ) from None


def _from_file(settings: Settings) -> str:
    path = settings.database_file
    if path is None:
        raise SettingsError("FLOWBRIDGE_SECRET_KEY: set it, since the database is no file that a key could lie beside")
    path = Path(f"{path}.key")
    try:
        if not path.exists():
            _make_key(path)
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"FLOWBRIDGE_SECRET_KEY: cannot make or read {path}: {error}") from None


def _make_key(path: Path) -> None:
    """On the disk whole, or not at all: without it no token that it encrypts can be read again."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f"{path.name}.") as file:  # 0600
        file.write(Fernet.generate_key())
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster: then its key counts
            os.link(file.name, path)


class Tokens:
    """Which token an account sends with. `remember` and `of` are for one event loop."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal
        self._fernet: Fernet
        self._known: dict[str, Known] = {}
        self._noted: dict[str, float] = {}  # when an account was written last, monotonic
        self._reading: dict[str, asyncio.Task[Known | None]] = {}
        self.on_change: Callable[[str], None] | None = None  # told of an account that has a new token

    def unlock(self, fernet: Fernet) -> None:
        """Give the cipher, before anything else is asked."""
        self._fernet = fernet

    def remember(self, caller: Caller) -> str:
        """Note whose token it is, before the next acceptance is written. Returns the account.

        Noted again from time to time: a token that is in use must not be dropped between two events.
        """
        account = _account_of(caller.user_id)
        known = (caller.user_id, caller.device_id, caller.token)
        is_new = self._known.get(account) != known
        if is_new or self._noted.get(account, -math.inf) < time.monotonic() - NOTE_SECONDS:
            self._note(account, known)
        if is_new and self.on_change is not None:
            self.on_change(account)
        return account

    def _note(self, account: str, known: Known) -> None:
        _keep(self._known, account, known)
        _keep(self._noted, account, time.monotonic())
        user_id, device_id, token = known
        self._journal.remember(
            {
                "account": account,
                "user_id": user_id,
                "device_id": device_id,
                "token": self._fernet.encrypt(token.encode()).decode(),
                "token_hash": accounts.token_hash(token),
                "seen_at": outbox.now_ms(),
            }
        )

    def forget(self, account: str) -> None:
        """Read the account's token anew when it is needed: another process may have been given a newer one."""
        self._known.pop(account, None)

    def knows(self, account: str) -> bool:
        """Whether `of` need not ask the store."""
        return account in self._known

    async def of(self, account: str) -> Known | None:
        """Who an account is and its token; None when that is not in the store."""
        known = self._known.get(account)
        if known is not None:
            return known
        reading = self._reading.get(account)
        if reading is None:
            reading = self._reading[account] = asyncio.ensure_future(self._read(account))
            reading.add_done_callback(lambda _: self._reading.pop(account, None))
        return await asyncio.shield(reading)

    async def identity(self, token: str) -> tuple[str, str | None] | None:
        """Whose token this is, by what was seen before."""
        if not self._database.is_open:
            return None
        return await self._database.read(lambda connection: accounts.by_token(connection, token))

    async def _read(self, account: str) -> Known | None:
        stored = await self._database.run(lambda connection: accounts.tokens_of(connection, account))
        if not stored:
            return None
        user_id, device_id, secret = stored[0]
        try:
            token = self._fernet.decrypt(secret.encode()).decode()
        except InvalidToken:
            log.error("token_unreadable", user=user_id, hint="FLOWBRIDGE_SECRET_KEY is not the one it was written with")
            return None
        if account not in self._known:  # else it has got a newer one meanwhile
            _keep(self._known, account, (user_id, device_id, token))
        return self._known[account]


def _keep(memory: dict[str, V], account: str, value: V) -> None:
    if len(memory) >= MAX_KNOWN and account not in memory:
        del memory[next(iter(memory))]
    memory[account] = value
