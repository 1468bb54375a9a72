"""The accounts that are listened to just now."""

from functools import partial

from flowbridge.callers import Callers
from flowbridge.errors import MatrixError
from flowbridge.homeserver import Homeserver
from flowbridge.live.feed import Feed
from flowbridge.live.frames import Wish
from flowbridge.live.listener import Listener
from flowbridge.live.position import Position
from flowbridge.live.reader import Reader
from flowbridge.models import Caller


class Live:
    """One feed for each token that is listened with, however many listen."""

    def __init__(self, homeserver: Homeserver, callers: Callers) -> None:
        self._homeserver = homeserver
        self._callers = callers
        self._feeds: dict[str, Feed] = {}

    async def listen(self, caller: Caller, wish: Wish, position: Position | None) -> Listener:
        """A listener that is told what comes, and with a position what has come since. Raises as `Feed.join`."""
        feed = self._feeds.get(caller.token)
        if feed is None:
            reader = Reader(self._homeserver, caller.user_id, caller.token)
            feed = Feed(caller.user_id, reader, self._refused, partial(self._forget, caller.token))
            self._feeds[caller.token] = feed
        listener = Listener(caller, wish, feed.leave)
        await feed.join(listener, position)
        return listener

    def stop(self) -> None:
        """End all streams: the bridge ends."""
        for feed in list(self._feeds.values()):
            feed.stop()

    def end(self, user_id: str) -> None:
        """End a user's streams: those who may listen come back. A token that is refused shows at its next poll only."""
        for feed in list(self._feeds.values()):
            if feed.user_id == user_id:
                feed.stop()

    def _forget(self, token: str) -> None:
        del self._feeds[token]

    def _refused(self, listener: Listener, error: MatrixError) -> MatrixError:
        return self._callers.refused(listener.caller, error)
