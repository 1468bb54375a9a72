"""flowbridge.auth.api_keys.permit_reading"""

import pytest

from flowbridge.auth import api_keys
from flowbridge.errors import Forbidden
from flowbridge.models import ApiKey

ROOM, OTHER, ALIAS = "!a:hs", "!b:hs", "#ops:hs"


@pytest.mark.parametrize(
    ("key", "room", "everything"),
    [
        (ApiKey("k"), True, True),
        (ApiKey("k", admin=True), True, True),
        (ApiKey("k", rooms=(ROOM,)), True, False),
        (ApiKey("k", rooms=(ALIAS,)), True, False),
        (ApiKey("k", rooms=(OTHER,)), False, False),
        (ApiKey("k", rooms=(ROOM,), admin=True), True, False),
        (ApiKey("k", rooms=(OTHER,), admin=True), False, False),
        (ApiKey("k", event_types=("m.room.*",)), False, False),
        (ApiKey("k", event_types=("m.room.*",), admin=True), False, False),
    ],
)
def test_scopes(key: ApiKey, *, room: bool, everything: bool) -> None:
    for rooms, good in (((ALIAS, ROOM), room), ((), everything)):
        if good:
            api_keys.permit_reading(key, rooms)
        else:
            with pytest.raises(Forbidden):
                api_keys.permit_reading(key, rooms)
