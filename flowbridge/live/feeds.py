"""The feeds of the accounts that are listened to."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from flowbridge.auth.callers import Callers
from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.sync import Json
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter, Place
from flowbridge.live.feed import Feed
from flowbridge.live.frames import EventFilter
from flowbridge.live.listener import Listener
from flowbridge.live.position import Position
from flowbridge.live.reader import Reader
from flowbridge.models import Caller
from flowbridge.models.timing import Timing

Shown = Callable[[str, str, Json], Awaitable[Json]]

MAX_STREAMS: Final = 3_072  # three quarters of the connections that the server takes
MAX_STREAMS_OF_ONE: Final = 768  # of one API key, or one user
MAX_FEEDS: Final = 1_024  # long polls: one for each access token
MAX_FEEDS_OF_ONE: Final = 32  # of one user


class Live:
    """One feed for each access token, however many listeners it has.

    `shown`: given a user, a room and an event, the event as this user reads it: decrypted, perhaps.
    """

    def __init__(
        self, homeserver: Homeserver, callers: Callers, *, shown: Shown | None = None, timing: Timing = Timing()
    ) -> None:
        self._shown = shown
        self._homeserver = homeserver
        self._callers = callers
        self._timing = timing
        self._feeds: dict[str, Feed] = {}
        self._streams = Limiter("live streams", MAX_STREAMS, MAX_STREAMS_OF_ONE)
        self._polls = Limiter("devices that are listened with", MAX_FEEDS, MAX_FEEDS_OF_ONE)

    async def listen(self, caller: Caller, wanted: EventFilter, position: Position | None) -> Listener:
        """A listener that is notified of new events and, with a position, of all events since then.

        Raises TooMany, or what `Feed.join` raises.
        """
        place = self._streams.hold(peer.who())
        try:
            feed = self._feeds.get(caller.token) or self._feed(caller)
            listener = Listener(caller, wanted, partial(_leave, feed, place))
            await feed.join(listener, position)
        except BaseException:
            place.free()
            raise
        return listener

    def stop(self) -> None:
        """The bridge stops: end all streams."""
        for feed in list(self._feeds.values()):
            feed.stop()

    def _feed(self, caller: Caller) -> Feed:
        place = self._polls.hold(caller.user_id)
        reader = Reader(self._homeserver, caller.user_id, caller.token)
        feed = Feed(
            caller.user_id,
            reader,
            self._refused,
            partial(self._forget, caller.token, place),
            shown=partial(self._shown, caller.user_id) if self._shown is not None else None,
            timing=self._timing,
        )
        self._feeds[caller.token] = feed
        return feed

    def tell(self, user_id: str, room_id: str, event: Json) -> None:
        """Notify a user's listeners once more of an event that they could not read."""
        for feed in list(self._feeds.values()):
            if feed.user_id == user_id:
                feed.tell(room_id, event)

    def end(self, user_id: str) -> None:
        """End a user's streams: listeners that may listen come back. A refused token shows only at its next poll."""
        for feed in list(self._feeds.values()):
            if feed.user_id == user_id:
                feed.stop()

    def _forget(self, token: str, place: Place) -> None:
        del self._feeds[token]
        place.free()

    def _refused(self, listener: Listener, error: MatrixError) -> MatrixError:
        return self._callers.refused(listener.caller, error)


def _leave(feed: Feed, place: Place, listener: Listener) -> None:
    place.free()
    feed.leave(listener)
