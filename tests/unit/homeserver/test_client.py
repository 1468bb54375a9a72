"""flowbridge.homeserver.client: what is taken from an answer."""

import json
from typing import Any

import pytest

from flowbridge.errors import BadGateway
from flowbridge.homeserver import Homeserver
from flowbridge.homeserver.pool import Answer


class Answering(Homeserver):
    """Answers this to whatever it is asked."""

    def __init__(self, value: Any) -> None:
        self._value = value

    async def call(self, *_: Any, **__: Any) -> Answer:
        return Answer(200, (), json.dumps(self._value).encode())


@pytest.mark.parametrize("device", ["PHONE", None, "phöne 📱"])
async def test_account_has_a_user_and_perhaps_a_device(device: str | None) -> None:
    answer = {"user_id": "@alice:hs", "device_id": device}
    assert await Answering(answer).whoami("token") == ("@alice:hs", device)


@pytest.mark.parametrize("device", ["\0", "a\nb", "\ud800", 7])
async def test_device_that_no_database_could_hold_is_refused(device: Any) -> None:
    """A user gives it any name at login; written together with the events of others it would stop them all."""
    with pytest.raises(BadGateway):
        await Answering({"user_id": "@alice:hs", "device_id": device}).whoami("token")
