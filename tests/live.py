"""A homeserver made of dictionaries, for the code that listens to one."""

import json
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from flowbridge.errors import BadGateway
from flowbridge.homeserver.client import json_of
from flowbridge.homeserver.pool import Answer

PAGE = 3


class Rooms:
    """A homeserver: room → its events in order, each with its position in the stream of all events."""

    def __init__(self, **rooms: list[tuple[int, str]]) -> None:
        self.rooms = {f"!{name}": events for name, events in rooms.items()}
        self.closed: set[str] = set()
        self.targets: list[str] = []
        self.shuffled = False  # /messages orders events differently from /sync, as with events of other servers
        self.extra: dict[str, Any] = {}
        self.fails = False  # every other request
        self.failing = False

    async def poll(self, target: str, **_: object) -> tuple[bytes, Any]:
        found = self.ask(target)
        return found.body, await json_of(found)

    def ask(self, target: str) -> Answer:
        self.targets.append(target)
        self.failing = not self.failing if self.fails else False
        if self.failing:
            raise BadGateway("away")
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if path.endswith("/sync"):
            return answer(self._sync(int(query.get("since", ["0"])[0]), json.loads(query["filter"][0])))
        room = unquote(path.split("/")[-2])
        if room in self.closed:
            return answer({"errcode": "M_FORBIDDEN", "error": "You are not in the room"}, 403)
        since, _, start = query["from"][0].partition("/")
        return answer(self._page(room, int(since), int(query["to"][0]), int(start or 0)))

    def _sync(self, since: int, filter_: Any) -> Any:
        most = filter_["room"].get("timeline", {}).get("limit", 1)
        found = {}
        for room, all_ in ({} if filter_["room"].get("rooms") == [] else self.rooms).items():
            events = [self._event(id_) for place, id_ in all_ if place > since]
            if events:
                found[room] = {"timeline": {"events": events[-most:], "limited": len(events) > most}}
        head = max(place for events in self.rooms.values() for place, _ in events)
        return {"next_batch": str(head), "rooms": {"join": found}}

    def _page(self, room: str, since: int, until: int, start: int) -> Any:
        events = [self._event(id_) for place, id_ in self.rooms[room] if since < place <= until]
        if self.shuffled:
            events.sort(key=lambda event: str(event["event_id"])[::-1])
        page = events[start : start + PAGE]
        return {"chunk": page} | ({"end": f"{since}/{start + PAGE}"} if page else {})

    def _event(self, id_: str) -> dict[str, Any]:
        return {"event_id": id_, "type": "m.room.message", **self.extra.get(id_, {})}


def answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, (), json.dumps(value).encode())
