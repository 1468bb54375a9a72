"""The hooks, as they are known in memory: which of them a request is for, and with which secrets."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from cryptography.fernet import Fernet
from sqlalchemy import Connection

from flowbridge import log
from flowbridge.errors import Unavailable
from flowbridge.hooks import file, secrets
from flowbridge.hooks.definition import Definition
from flowbridge.hooks.known import Known, Secret
from flowbridge.limits.lookups import LookUps
from flowbridge.models.hooks import TOKEN, Hook
from flowbridge.models.timing import Timing
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import Database, clock, hooks
from flowbridge.store.hooks import HOLDING, StoredSecret

NOTE_SECONDS = 60.0  # between two writes of when hooks were used
MAX_FAILURE = 1_000  # characters

_KEY_HINT = "FLOWBRIDGE_SECRET_KEY is not the one that its secret was written with: set that one, or rotate the secret"


@dataclass(frozen=True, slots=True)
class _Kept:
    """A hook with its secrets, the newest first, and when each ends (ms). `is_sealed`: none of them can be read."""

    hook: Hook
    secrets: tuple[tuple[Secret, int | None], ...]
    is_sealed: bool = False

    def now(self) -> Known:
        """Raises Unavailable where its sender cannot be checked: a 401 would be taken for good."""
        if self.is_sealed:
            raise Unavailable("this hook cannot check its senders at the moment; the bridge's log says why")
        at = clock.now_ms()
        return Known(self.hook, tuple(secret for secret, until in self.secrets if until is None or until > at))


@dataclass(slots=True)
class _Stored:
    """What was read of the store."""

    versions: dict[str, int] = field(default_factory=dict)
    hooks: dict[str, Hook] = field(default_factory=dict)
    secrets: list[StoredSecret] = field(default_factory=list)
    failing: dict[str, str] = field(default_factory=dict)


class Registry:
    """The hooks of the store and of hooks.yaml; of two with one name, the file's. For one event loop."""

    def __init__(self, settings: Settings, database: Database, *, timing: Timing = Timing()) -> None:
        self.path = settings.hooks_file
        self._database = database
        self.clock = timing.clock
        unread = "hooks cannot be looked up: the store cannot be read at the moment"
        self._lookups = LookUps(self._read, "hooks_unread", unread, timing=timing)
        self.fernet: Fernet
        self.fixed: dict[str, Definition] = {}
        self.trouble = ""  # why the file could not be read again: what was read before holds
        self._stored = _Stored()
        self._known: dict[str, _Kept] = {}
        self._tokens: dict[bytes, str] = {}  # SHA-256 → name
        self._opened: dict[str, Secret | None] = {}  # by the hash of the stored one
        self._has_read = False
        self._told: set[str] = set()  # of which the log has said that they cannot be used, or are hidden
        self._used: dict[str, int] = {}
        self._failures: dict[str, str] = {}
        self._note_at = 0.0
        self._writing = asyncio.Lock()

    def open(self, fernet: Fernet) -> None:
        """Read the file, and set the cipher, before anything else is called. Raises SettingsError."""
        self.fernet = fernet
        self.fixed = self.load()
        self._build()

    # what requests ask

    def at_once(self, name: str) -> Known | None:
        """As `find`, of those that are known in memory."""
        found = self._known.get(name)
        return found.now() if found else None

    async def find(self, name: str) -> Known | None:
        """The hook of this name, and the secrets that hold. Raises Unavailable.

        For an unknown one the store is read, once a second for all of them together.
        """
        if name not in self._known:
            await self._lookups.look()
            if name not in self._known:
                self._lookups.check()
        return self.at_once(name)

    async def find_by_token(self, token: str) -> Known | None:
        """The hook with this token in its path. Raises Unavailable."""
        digest = hooks.digest(token)
        if digest not in self._tokens:
            await self._lookups.look()
            if digest not in self._tokens:
                self._lookups.check()
        name = self._tokens.get(digest)
        found = self._known[name].now() if name is not None else None
        return found if found and any(secret.digest == digest for secret in found.secrets) else None

    async def since(self, moment: float) -> None:
        """Wait until the store has been read since then (`clock`): a secret that is wrong, or unknown, may be newer.

        It takes as long whether there is such a hook or not. Raises Unavailable.
        """
        await self._lookups.since(moment)

    def hook(self, name: str) -> Hook | None:
        """As it is known in memory."""
        found = self._known.get(name)
        return found.hook if found else None

    def is_hook(self, name: str) -> bool:
        """Whether there is one of this name, as far as that is known in memory."""
        return name in self._known

    def note_use(self, name: str) -> None:
        self._used[name] = clock.now_ms()

    def note_failure(self, name: str, text: str) -> None:
        """Its template failed, for this reason; "": it has worked. No request waits for this."""
        if text or self._failures.get(name, self._stored.failing.get(name)):
            self._failures[name] = text[:MAX_FAILURE]

    @property
    def failing(self) -> Mapping[str, str]:
        """The hooks whose template failed, as far as this process knows: name → how."""
        return {name: text for name, text in {**self._stored.failing, **self._failures}.items() if text}

    # keeping up with the store and the file

    async def refresh(self) -> None:
        """Read which hooks there are; to be called at the start and every `key_refresh_seconds`."""
        await self._lookups.refresh()

    def unreadable(self, connection: Connection) -> list[str]:
        """The hooks with a secret that was written with another secret key."""
        kept = hooks.secrets(connection, clock.now_ms())
        return sorted({secret.hook for secret in kept if secrets.opened(secret, self.fernet) is None})

    async def flush(self) -> None:
        """Write when hooks were last used, to the minute, and how their templates failed. Likewise."""
        if self._database.trouble or self._database.missing:
            return
        async with self._writing:  # also for who finds nothing new: what is being written should be there
            now = self.clock()
            if not self._failures and (not self._used or now < self._note_at):
                return
            used = {name: at for name, at in self._used.items() if name in self._known}  # others are deleted
            failures = {name: text for name, text in self._failures.items() if name in self._known}
            self._used, self._failures, self._note_at = {}, {}, now + NOTE_SECONDS
            self._stored.failing.update(failures)
            work = partial(hooks.note, used=used, failures=failures, now=clock.now_ms())
            with contextlib.suppress(Unavailable):
                await self._database.run(work, lingers=True, alone=True)

    def load(self) -> dict[str, Definition]:
        """The file as it is now. Raises SettingsError."""
        return file.load(self.path) if self.path else {}

    def take(self, fixed: dict[str, Definition]) -> None:
        """These are the hooks of the file from now on."""
        self.fixed = fixed
        self.trouble = ""
        self._told.clear()
        self._build()
        log.info("hooks_reloaded", file=str(self.path), hooks=len(fixed))

    def keep(self, error: SettingsError) -> None:
        """The file cannot be used as it is now: what was read before holds."""
        self.trouble = str(error)
        log.error("hooks_file_refused", error=self.trouble, hint="the hooks that were read before stay as they are")

    async def _read(self) -> bool:
        if not self._database.is_open:
            return False
        before = self._stored
        found = await self._database.read(partial(_read, before=before))
        if found.versions != before.versions or found.secrets != before.secrets or not self._has_read:
            self._stored, self._has_read = found, True
            self._build()
        self._stored = found
        return True

    def _build(self) -> None:
        """Put together what requests ask for."""
        stored = dict(self._stored.hooks)
        for name in stored.keys() & self.fixed.keys():
            self._tell(name, "hook_hidden", hint="hooks.yaml has a hook of this name, which counts")
        present = {**stored, **{name: each.hook for name, each in self.fixed.items()}}
        secrets_of: dict[str, list[StoredSecret]] = {}
        for secret in self._stored.secrets:
            secrets_of.setdefault(secret.hook, []).append(secret)
        known = {name: self._kept(hook, secrets_of.get(name, [])) for name, hook in present.items()}
        self._known = known
        self._opened = {secret.hash: self._opened.get(secret.hash) for secret in self._stored.secrets}
        self._tokens = {
            secret.digest: kept.hook.name
            for kept in sorted(known.values(), key=lambda kept: kept.hook.is_fixed)
            if kept.hook.verification.scheme == TOKEN
            for secret, _ in kept.secrets
        }

    def _kept(self, hook: Hook, stored: list[StoredSecret]) -> _Kept:
        given = self.fixed[hook.name].secrets if hook.is_fixed else ()
        if given:
            return _Kept(hook, tuple((secrets.plain(secret), None) for secret in given))
        signs = hook.verification.scheme != TOKEN
        usable = [secret for secret in stored if (secret.sealed is not None) is signs][:HOLDING]
        found = [(self._open_secret(secret), secret.until) for secret in usable]
        kept = tuple((secret, until) for secret, until in found if secret is not None)
        if len(kept) < len(found):
            self._tell(hook.name, "hook_secret_unreadable", hint=_KEY_HINT)
        if not found and self._has_read:
            self._tell(hook.name, "hook_without_secret", hint=f"`flowbridge hooks rotate {hook.name}` makes one")
        return _Kept(hook, kept, is_sealed=bool(found) and not kept)

    def _open_secret(self, stored: StoredSecret) -> Secret | None:
        """Decrypting takes 50 µs: of 1,000 hooks, only those that are new are opened."""
        if (known := self._opened.get(stored.hash)) is None:
            known = self._opened[stored.hash] = secrets.opened(stored, self.fernet)
        return known

    def _tell(self, name: str, action: str, *, hint: str) -> None:
        """Once, not with each read."""
        if f"{action} {name}" not in self._told:
            self._told.add(f"{action} {name}")
            log.warning(action, hook=name, hint=hint)


def _read(connection: Connection, before: _Stored) -> _Stored:
    """Definitions are up to 16 KiB each, so only what has changed is read."""
    versions = hooks.versions(connection)
    changed = [name for name, version in versions.items() if before.versions.get(name) != version]
    kept = {name: hook for name, hook in before.hooks.items() if name in versions and name not in changed}
    kept |= {hook.name: hook for hook in hooks.some(connection, changed)} if changed else {}
    return _Stored(versions, kept, hooks.secrets(connection, clock.now_ms()), hooks.failing(connection))
