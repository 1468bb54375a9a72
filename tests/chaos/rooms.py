"""The rooms of a scripted homeserver: events in the order they came, and the sends that it remembers."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Any

from tests.chaos import stories

Content = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Device:
    """The sender. An application service's token has no device."""

    user: str
    device: str | None


@dataclass(slots=True)
class Event:
    event_id: str
    room: str
    type: str
    content: Content
    by: Device
    txn_id: str | None
    state_key: str | None
    at: float


@dataclass(slots=True)
class _Sent:
    event_id: str
    until: float


@dataclass(slots=True)
class _Room:
    events: list[Event] = field(default_factory=list)
    state: dict[tuple[str, str], Event] = field(default_factory=dict)


def sum_of(data: bytes) -> str:
    """By this the fuzzer recognises what it sent."""
    return hashlib.sha256(data).hexdigest()


def device_of(token: str) -> Device | None:
    """`syt_NAME` is the user @NAME, `syt_NAME_nodevice` the same without a device; None for any other token.

    `syt_NAME_DEVICE~1` and `syt_NAME_DEVICE~2` are two tokens of one device.
    """
    prefix, _, rest = token.partition("~")[0].partition("_")
    name, _, device = rest.partition("_")
    if prefix != "syt" or not name:
        return None
    return Device(f"@{name}:chaos.test", None if device == "nodevice" else (device or "CHAOS").upper())


class Rooms:
    """All rooms exist and every user is in them. `log` gets one line of JSON for each event, written at once.

    `remember`: for how many seconds a transaction id is known. `repeats`: sends that were known already; `stale`: those
    of them after which the room had gone on. The memory hides both from the rooms' members, so a sender that lost its
    lease without noticing shows here.
    """

    def __init__(
        self, log: RawIOBase | None = None, remember: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.events: list[Event] = []
        self.remember = remember
        self.repeats = 0
        self.stale = 0
        self._log = log
        self._clock = clock
        self._rooms: dict[str, _Room] = {}
        self._sent: dict[tuple[Device, str, str], _Sent] = {}

    def send(self, by: Device, room: str, type_: str, txn_id: str, content: Content) -> str:
        """Store an event; its id. As in Synapse, the txnId counts for user, device and room, never for the content."""
        key, now = (by, room, txn_id), self._clock()
        known = self._sent.get(key)
        if known is not None and known.until > now:
            self.repeats += 1
            self.stale += known.event_id != self._room(room).events[-1].event_id
            return known.event_id
        event = self._store(by, room, type_, content, txn_id, None)
        self._sent[key] = _Sent(event.event_id, now + self.remember)
        return event.event_id

    def put_state(self, by: Device, room: str, type_: str, state_key: str, content: Content) -> str:
        """Set a state. An unchanged one makes no new event."""
        state = self._room(room).state
        known = state.get((type_, state_key))
        if known is None or known.content != content:
            known = state[type_, state_key] = self._store(by, room, type_, content, None, state_key)
        return known.event_id

    def state(self, room: str, type_: str, state_key: str) -> Content | None:
        found = self._room(room).state.get((type_, state_key))
        return found.content if found else None

    def messages(self, by: Device, room: str, start: str | None, limit: int, *, back: bool) -> dict[str, Any]:
        """One page of the timeline; `end` is missing on the last one."""
        events = self._room(room).events
        at = _position(start, len(events) if back else 0)
        if back:
            chunk, end, more = events[max(0, at - limit) : at][::-1], at - limit, at > limit
        else:
            chunk, end, more = events[at : at + limit], at + limit, at + limit < len(events)
        page = {"start": f"t{at}", "chunk": [_shown(event, by) for event in chunk]}
        return {**page, "end": f"t{end}"} if more else page

    def forget(self) -> None:
        """Forget every send, as after the memory's time or a restart that lost it."""
        self._sent.clear()

    def _room(self, room: str) -> _Room:
        return self._rooms.setdefault(room, _Room())

    def _store(
        self, by: Device, room: str, type_: str, content: Content, txn_id: str | None, state_key: str | None
    ) -> Event:
        event = Event(f"${len(self.events) + 1}", room, type_, content, by, txn_id, state_key, time.time())
        self.events.append(event)
        self._room(room).events.append(event)
        if self._log is not None:
            self._log.write(json.dumps(_line(event)).encode() + b"\n")
        return event


def _line(event: Event) -> dict[str, Any]:
    line = {
        "room": event.room,
        "sender": event.by.user,
        "txn_id": event.txn_id,
        "n": event.content.get("n"),
        "event_id": event.event_id,
        "at": event.at,
    }
    if "sum" in event.content:  # fuzzer.py's: whether the content arrived as it was sent
        line["altered"] = event.content["sum"] != sum_of(str(event.content.get("body")).encode())
    if (number := stories.number_of(event.content)) is not None:
        relation = event.content.get("m.relates_to", {})
        line |= {"n": number, "relation": relation.get("event_id"), "pings": bool(event.content.get("m.mentions"))}
    return line


def _position(token: str | None, default: int) -> int:
    return int(token[1:]) if token and token[1:].isdigit() else default


def _shown(event: Event, by: Device) -> dict[str, Any]:
    """The event as this device reads it: only the device that sent it sees the transaction id."""
    unsigned: dict[str, Any] = {"age": int((time.time() - event.at) * 1000)}
    if event.txn_id is not None and by.device is not None and by == event.by:
        unsigned["transaction_id"] = event.txn_id
    shown: dict[str, Any] = {
        "event_id": event.event_id,
        "room_id": event.room,
        "type": event.type,
        "sender": event.by.user,
        "content": event.content,
        "origin_server_ts": int(event.at * 1000),
        "unsigned": unsigned,
    }
    return shown if event.state_key is None else {**shown, "state_key": event.state_key}
