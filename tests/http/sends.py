"""Shared by tests of sends: requests, scripts, and checks of the answers."""

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, ROOM
from tests.upstream import PATIENCE, Behaviour, Request

MATRIX = "/_matrix/client/v3"
STATE = f"/rooms/{ROOM}/state/m.room.topic"
ELSEWHERE = "/rooms/!elsewhere:upstream/send/m.room.message"
ASYNC = {"Prefer": "respond-async"}
NOW = {"Prefer": "wait=0"}
KEYED = {"Idempotency-Key": "the key"}
SURFACES = pytest.mark.parametrize("prefix", ["", MATRIX], ids=["flow", "matrix"])

UNKNOWN_TOKEN = scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Token is not active")
BROKEN = scripted.matrix_error(500, "M_UNKNOWN", "Internal server error")


def limited(ms: int) -> Behaviour:
    return scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "Too many requests", retry_after_ms=ms)


def text(body: str = "hello") -> dict[str, Any]:
    return {**HELLO, "body": body}


def check_queued(answer: httpx.Response) -> str:
    """The delivery id, when the answer says that the event is queued."""
    assert answer.status_code == 202, answer.text
    delivery = answer.headers["flowbridge-delivery"]
    assert answer.json() == {"delivery_id": delivery, "status": "queued"}
    assert answer.headers["location"] == f"/deliveries/{delivery}"
    return str(delivery)


def event_id(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["event_id"]
    assert "location" not in answer.headers
    assert answer.headers["flowbridge-delivery"]
    return str(answer.json()["event_id"])


def repeated(call: Callable[[], httpx.Response], good: Callable[[httpx.Response], object]) -> httpx.Response:
    """The first good answer: on a busy machine a short wait can end before the first attempt."""
    ending = time.monotonic() + PATIENCE
    while not good(answer := call()):
        assert time.monotonic() < ending, answer.text
    return answer


def is_replayed(answer: httpx.Response) -> bool:
    assert answer.headers.get("idempotent-replayed", "true") == "true"
    return "idempotent-replayed" in answer.headers


def first(*faults: Behaviour, then: scripted.Script) -> scripted.Script:
    """Each fault for one send, then what `then` does."""
    left = list(faults)

    def script(request: Request) -> Behaviour | None:
        return left.pop(0) if left and request.method == "PUT" else then(request)

    return script


def held(event: threading.Event, script: scripted.Script) -> scripted.Script:
    """The script, but sends are answered only after the event."""

    def wait(request: Request) -> Behaviour | None:
        behaviour = script(request)
        return scripted.when(event, behaviour) if behaviour and request.method == "PUT" else behaviour

    return wait


def lines(caplog: pytest.LogCaptureFixture, action: str) -> list[dict[str, Any]]:
    """The fields of each log line of this action."""
    return [record.fields for record in caplog.records if record.msg == action]  # type: ignore[attr-defined]
