"""Callers' tokens: kept encrypted beside their events, found by account, unreadable without the secret key."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from cryptography.fernet import Fernet, InvalidToken

from flowbridge import log
from flowbridge.limits.tasks import Once
from flowbridge.models import Caller
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import Database, accounts, clock

V = TypeVar("V")
Known = tuple[str, str | None, str]  # user id, device id, token

MAX_KNOWN = 10_000
MAX_TOKENS = 20  # of one account, in memory
_account_of = lru_cache(MAX_KNOWN)(accounts.account_of)
digest_of = lru_cache(MAX_KNOWN)(accounts.token_hash)


def cipher(settings: Settings) -> Fernet:
    """The cipher of the secret key."""
    return Fernet(secret_key(settings))


def secret_key(settings: Settings) -> str:
    """FLOWBRIDGE_SECRET_KEY, or what is in a 0600 key file beside the database, which is made when missing."""
    key = settings.secret_key.get_secret_value() if settings.secret_key else _from_file(settings)
    try:
        Fernet(key)
        return key
    except ValueError:
        raise SettingsError(
            "FLOWBRIDGE_SECRET_KEY: a Fernet key is 32 bytes in URL-safe base64; "
            "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'` makes one"
        ) from None


def known_secret_key(settings: Settings) -> str | None:
    """The same, without making one. Raises SettingsError."""
    path = settings.database_file
    is_known = settings.secret_key is not None or (path is not None and Path(f"{path}.key").exists())
    return secret_key(settings) if is_known else None


def _from_file(settings: Settings) -> str:
    path = settings.database_file
    if path is None:
        raise SettingsError(
            "FLOWBRIDGE_SECRET_KEY: set it: the database is not a file, beside which a key could be kept"
        )
    path = Path(f"{path}.key")
    try:
        if not path.exists():
            _make_key(path)
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"FLOWBRIDGE_SECRET_KEY: cannot make or read {path}: {error}") from None


def _make_key(path: Path) -> None:
    """Write it whole, or not at all: without it no token that it encrypted can be read again."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f"{path.name}.") as file:  # 0600
        file.write(Fernet.generate_key())
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster: its key counts
            os.link(file.name, path)


class Tokens:
    """The tokens that an account can send with. `remember`, `refuse` and `of` are for one event loop.

    A refused token is not used again until `remember` is called with it: then the homeserver has said whose it is.
    `write`: queues what the store is to keep of an account.
    """

    def __init__(
        self,
        database: Database,
        write: Callable[[dict[str, Any]], object],
        *,
        timing: Timing = Timing(),
        max_known: int = MAX_KNOWN,
    ) -> None:
        self._database = database
        self._write = write
        self._note_seconds = timing.token_idle_seconds / 2  # no token may be dropped between two notes
        self._clock = timing.clock
        self._max_known = max_known
        self._fernet: Fernet
        self._known: dict[str, dict[str, Known]] = {}  # account → token → whose; the latest is last
        self._refused: dict[str, None] = {}
        self._noted: dict[str, float] = {}  # when a token was written last, monotonic
        self._reading = Once[str, Known | None]()
        # Called with an account that has a new token, and whether that was refused before.
        self.on_change: Callable[[str, bool], None] | None = None

    def unlock(self, fernet: Fernet) -> None:
        """Set the cipher, before anything else is called."""
        self._fernet = fernet

    def remember(self, caller: Caller) -> str:
        """Note whose token it is, before the next acceptance is written. Returns the account.

        It is noted again from time to time: a token in use must not be dropped between two events. Of a caller without
        a token (all are refused, or none is known) only the user is noted.
        """
        account, token = _account_of(caller.user_id), caller.token
        was_refused = token in self._refused
        is_new = bool(token) and self._use(account, (caller.user_id, caller.device_id, token))
        if is_new or self._noted.get(token or account, -math.inf) < self._clock() - self._note_seconds:
            self._note(account, caller)
        if is_new and self.on_change is not None:
            self.on_change(account, was_refused)
        return account

    def trust(self, caller: Caller) -> None:
        """Use a token without noting it in the store: for a command beside a server."""
        self._use(_account_of(caller.user_id), (caller.user_id, caller.device_id, caller.token))

    def _use(self, account: str, known: Known) -> bool:
        """Make this token the next that is used. Returns whether it is new."""
        good, token = self._known.get(account), known[2]
        if good is None:
            good = {}
            self._keep(self._known, account, good)
        elif good.get(token) == known:
            if next(reversed(good)) != token:
                good[token] = good.pop(token)
            return False
        for other in [other[2] for other in good.values() if other[1] == known[1] is not None]:
            del good[other]  # a device has one token
        good.pop(token, None)
        if len(good) >= MAX_TOKENS:
            del good[next(iter(good))]
        good[token] = known
        self._refused.pop(token, None)
        return True

    def _note(self, account: str, caller: Caller) -> None:
        token = caller.token
        self._keep(self._noted, token or account, self._clock())
        whose: dict[str, Any] = {"account": account, "user_id": caller.user_id}
        if token:
            whose |= {
                "device_id": caller.device_id,
                "token": self._fernet.encrypt(token.encode()).decode(),
                "token_hash": digest_of(token),
                "seen_at": clock.now_ms(),
            }
        self._write(whose)

    def refuse(self, account: str, token: str) -> None:
        """The homeserver does not accept this token: use another of the account, also after a restart."""
        self._known.get(account, {}).pop(token, None)
        self._noted.pop(token, None)
        if token not in self._refused:
            self._keep(self._refused, token, None)
            self._write({"account": account, "token_hash": digest_of(token), "refused_at": clock.now_ms()})

    def doubt(self, user_id: str) -> None:
        """Some tokens of a user may have ended: in the store all count as refused until they are seen again.

        Queued events are still sent with them, which shows whether they are accepted.
        """
        account = _account_of(user_id)
        for token in (account, *self._known.get(account, ())):
            self._noted.pop(token, None)
        self._write({"account": account, "refused_at": clock.now_ms()})

    def is_refused(self, token: str) -> bool:
        return token in self._refused

    def forget(self, account: str) -> None:
        """Read the account's tokens again when they are needed: another process may have a newer one."""
        self._known.pop(account, None)

    def knows(self, account: str) -> bool:
        """Whether `of` need not ask the store."""
        return bool(self._known.get(account))

    def at_hand(self, account: str, token: str = "") -> Known | None:
        """As `of`, without asking the store."""
        good = self._known.get(account)
        return (good.get(token) or good[next(reversed(good))]) if good else None

    async def of(self, account: str, token: str = "") -> Known | None:
        """The user, device and token of an account: `token` if that is one of its good ones, otherwise the latest.

        None when neither this process nor the store has a token that may be good.
        """
        known = self.at_hand(account, token)
        if known is not None:
            return known
        return await self._reading.get(account, partial(self._read, account))

    async def of_device(self, account: str, device_id: str) -> str | None:
        """A token of this device that may be good."""
        for _, device, token in (self._known.get(account) or {}).values():
            if device == device_id:
                return token
        stored = await self._database.read(lambda connection: accounts.tokens_of(connection, account))
        known = [each for each in map(self.opened, stored) if each is not None and each[2] not in self._refused]
        return next((token for _, device, token in known if device == device_id), None)

    async def identity(self, token: str) -> tuple[str, str | None] | None:
        """Whose token this is, by what the store remembers."""
        if not self._database.is_open:
            return None
        return await self._database.read(lambda connection: accounts.by_token(connection, token))

    async def refused(self, account: str) -> list[str]:
        """The refused tokens of an account; they may be good again, since an account may have been unlocked."""
        stored = await self._database.run(lambda connection: accounts.tokens_of(connection, account, refused=True))
        return [known[2] for known in map(self.opened, stored) if known is not None]

    async def _read(self, account: str) -> Known | None:
        stored = await self._database.run(lambda connection: accounts.tokens_of(connection, account))
        if not self._known.get(account):  # otherwise a newer one has come meanwhile
            found = [known for known in map(self.opened, reversed(stored[:MAX_TOKENS])) if known is not None]
            good = {known[2]: known for known in found if known[2] not in self._refused}
            if not good:
                return None
            self._keep(self._known, account, good)
        good = self._known[account]
        return good[next(reversed(good))]

    def opened(self, stored: accounts.Stored) -> Known | None:
        """A token from the store; None when it was written with another secret key."""
        try:
            return stored.user_id, stored.device_id, self._fernet.decrypt(stored.token.encode()).decode()
        except InvalidToken:
            hint = "FLOWBRIDGE_SECRET_KEY is not the one it was written with"
            log.error("token_unreadable", user=stored.user_id, hint=hint)
            return None

    def _keep(self, memory: dict[str, V], name: str, value: V) -> None:
        if len(memory) >= self._max_known and name not in memory:
            del memory[next(iter(memory))]
        memory[name] = value
