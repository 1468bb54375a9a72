"""Which events are encrypted in the store: where the bridge encrypts, all that are not known to go out in clear.

Accepting asks no homeserver, so it mostly does not know how the room of an event is. Where it is known that the event
goes out in clear, keeping it in clear costs nothing, and lets the engine search it.
"""

from collections.abc import Callable

from flowbridge.store.contents import LOCKED, Contents

IsPlain = Callable[[str, str, str | None], bool]  # by room, event type and state key


class AtRest:
    """`seals`: FLOWBRIDGE_ENCRYPTED_ROOMS is `encrypt`; otherwise all is kept as it came."""

    def __init__(
        self, contents: Contents = LOCKED, is_plain: IsPlain = lambda *_: True, *, seals: bool = False
    ) -> None:
        self._contents = contents
        self._is_plain = is_plain
        self.seals = seals
        self.has_sealed = False  # it may have been otherwise before

    def hides(self, room_id: str, event_type: str, state_key: str | None) -> bool:
        return self.seals and not self._is_plain(room_id, event_type, state_key)

    def mark(self, digest: str) -> str:
        """What is written down for a digest: from that of a short text the text could be guessed."""
        return self._contents.mark(digest.encode())[: len(digest)] if self.seals and digest else digest

    def other_mark(self, digest: str) -> str:
        """As it would be, were FLOWBRIDGE_ENCRYPTED_ROOMS another one: it may have been when it was written down."""
        return digest if self.seals else self._contents.mark(digest.encode())[: len(digest)]


PLAIN = AtRest()
