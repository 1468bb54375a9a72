"""Encryption between claim and send: what goes into an encrypted room is encrypted, or refused.

Plain text goes there only where FLOWBRIDGE_ENCRYPTED_ROOMS allows it. What is encrypted knows no Olm here: see
flowbridge/encryption, which needs a library that may not be installed.
"""

import time
from collections.abc import Iterable
from typing import Protocol

from flowbridge.errors import Forbidden, MatrixError, Unavailable
from flowbridge.homeserver import Homeserver
from flowbridge.models import Caller, Event
from flowbridge.models.timing import Timing
from flowbridge.store.accounts import account_of

MAX_PLAIN = 10_000  # rooms that are remembered
ENCRYPTED_BYTES = 47_500  # of a content that can be encrypted in any room: Base64 makes 4 bytes of 3 (see outbound.py)

_ALWAYS_PLAIN = frozenset({"m.room.encrypted", "m.room.redaction", "m.reaction"})

IN_PLAIN_TEXT = (
    "the room is encrypted, and this would go into it as plain text: send it to another room, or allow it with "
    "FLOWBRIDGE_ENCRYPTED_ROOMS=allow"
)


NOT_PASSED_ON = (
    "the room is encrypted, and a call with ?user_id= or the like is passed on as it is, in plain text: send it without"
)


class Encrypts(Protocol):
    """Accounts whose devices the bridge has: `flowbridge.encryption.devices.Devices`."""

    def encrypts_for(self, account: str) -> bool: ...

    async def encrypt(self, account: str, event: Event, delivery: str) -> bytes | None:
        """The content of the m.room.encrypted that this is sent as, the same for the same delivery.

        None in a room that is not encrypted. Raises MatrixError: Forbidden or TooLarge when it can never be sent so,
        HeldElsewhere when another process has the device.
        """

    async def made(self, delivery: str) -> bytes | None:
        """What a delivery was encrypted to before, by any process."""

    async def is_encrypted(self, room: str) -> bool:
        """Raises MatrixError when that cannot be learnt."""

    async def encrypt_for(self, caller: Caller, event: Event, delivery: str) -> bytes:
        """As `encrypt`, for an encrypted room, with a device of the caller's account that the bridge may use."""

    async def permit(self, caller: Caller) -> None:
        """Raises Forbidden, which says what to do, where the bridge may not use a device of this caller."""


class EncryptionCheck:
    """Remembers for a few seconds that a room is plain; an encrypted one is asked about each time.

    `refuses`: plain text, as FLOWBRIDGE_ENCRYPTED_ROOMS says. `devices`: who encrypts instead; None: nobody does. For
    one event loop.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        *,
        refuses: bool,
        devices: Encrypts | None = None,
        max_plain: int = MAX_PLAIN,
        timing: Timing = Timing(),
    ) -> None:
        self._homeserver = homeserver
        self._refuses = refuses
        self._devices = devices
        self._max_plain = max_plain
        self._plain_seconds = timing.plain_seconds
        self.plain_until: dict[str, float] = {}  # room → monotonic
        self._changes = 0  # how often rooms may have become encrypted

    async def refuses(self, token: str, event: Event, *, query: str = "") -> bool:
        """Whether this would put plain text into an encrypted room. Raises MatrixError when that cannot be learnt.

        `query`: as whom an application service asks.
        """
        if self.is_known_plain(event.room, event.type, event.state_key):
            return False
        asked, changes = time.monotonic(), self._changes
        if await self._homeserver.is_encrypted(token, event.room, query):
            return True
        self._note_plain(event.room, asked, changes)
        return False

    def refusal(self) -> Forbidden:
        """What the sender of a plain text is told."""
        return Forbidden(IN_PLAIN_TEXT if self._devices is None else NOT_PASSED_ON)

    def encrypts_for(self, account: str) -> bool:
        """Whether the bridge has a device of this account, so that `encrypt` takes the place of `refuses`."""
        return self._devices is not None and self._devices.encrypts_for(account)

    async def encrypt(self, account: str, event: Event, delivery: str) -> bytes | None:
        """What this is to be sent as, in an m.room.encrypted; None: as it is. Raises as `Encrypts.encrypt`."""
        assert self._devices is not None
        asked, changes = time.monotonic(), self._changes
        made = await self._devices.encrypt(account, event, delivery)
        if made is None:
            self._note_plain(event.room, asked, changes)
        return made

    async def encrypt_for(self, caller: Caller, event: Event, delivery: str) -> bytes:
        """As `encrypt`, for an account of which the bridge may have a device; raises Forbidden where it has none."""
        if self._devices is None:
            raise self.refusal()
        return await self._devices.encrypt_for(caller, event, delivery)

    async def made(self, delivery: str, event_type: str, state_key: str | None) -> bytes | None:
        """What a delivery was encrypted to, before an attempt of which the end is not known."""
        if self._devices is None or state_key is not None or event_type in _ALWAYS_PLAIN:
            return None
        return await self._devices.made(delivery)

    async def encrypts_files(self, caller: Caller, room: str) -> bool:
        """Whether a file that the caller sends to this room is to be encrypted before the homeserver has it.

        Raises Forbidden where the bridge encrypts, but not for this caller, and as `refuses`. Where it encrypts for
        nobody, what becomes of the event is found out when its turn comes, as for any other.
        """
        devices = self._devices
        if devices is None or self.is_known_plain(room, "m.room.message", None):
            return False
        try:
            encrypts = self.encrypts_for(account_of(caller.user_id))
        except Unavailable:  # whose file it is does not matter in a plain room
            if not await self.refuses(caller.token, Event(room, "m.room.message", b"", None)):
                return False
            raise
        asked, changes = time.monotonic(), self._changes
        try:
            if encrypts:
                is_encrypted = await devices.is_encrypted(room)
            else:
                is_encrypted = await self._homeserver.is_encrypted(caller.token, room)
        except MatrixError as error:
            if error.status != 403:
                raise
            return encrypts  # nobody says it until the account is in the room: a plain one takes both
        if not is_encrypted:
            self._note_plain(room, asked, changes)
        elif not encrypts:
            await devices.permit(caller)
        return is_encrypted

    def forget(self, rooms: Iterable[str]) -> None:
        """These may be encrypted by now."""
        for room in rooms:
            self.plain_until.pop(room, None)
            self._changes += 1

    def _note_plain(self, room: str, asked: float, changes: int) -> None:
        """`changes`: when it was asked; an answer that a change has overtaken says nothing of the time after it."""
        if changes != self._changes:
            return
        if len(self.plain_until) >= self._max_plain:
            self.plain_until.clear()
        self.plain_until[room] = asked + self._plain_seconds

    async def permit(self, token: str, event: Event, *, query: str = "") -> None:
        """Raise Forbidden for plain text into an encrypted room; otherwise as `refuses`."""
        if await self.refuses(token, event, query=query):
            raise self.refusal()

    def is_known_plain(self, room: str, event_type: str, state_key: str | None) -> bool:
        """Whether this may be sent as it is, without asking."""
        if not self._refuses or state_key is not None or event_type in _ALWAYS_PLAIN:
            return True
        return self.plain_until.get(room, 0.0) > time.monotonic()
