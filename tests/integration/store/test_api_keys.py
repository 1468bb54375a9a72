"""flowbridge.store.api_keys, on each engine: what tells that there are other keys, and when keys were used."""

from sqlalchemy import Engine

from flowbridge.models import ApiKey
from flowbridge.store import api_keys


def version(engine: Engine) -> tuple[int, ...]:
    with engine.connect() as connection:
        return api_keys.version(connection)


def test_version_is_another_one_after_each_change(engine: Engine) -> None:
    seen = [version(engine)]
    for number in range(3):
        with engine.begin() as connection:
            api_keys.add(connection, ApiKey(str(number)), f"fb_{number}")
        seen.append(version(engine))
    for number in (1, 0):
        with engine.begin() as connection:
            assert api_keys.revoke(connection, str(number))
        seen.append(version(engine))
    assert len(set(seen)) == 6
    with engine.begin() as connection:
        assert api_keys.revoke(connection, "1")
        api_keys.note_use(connection, {"2": 5})
    assert version(engine) == seen[-1], "of what has not changed"


def test_last_uses_are_noted_at_once_and_no_earlier_one_counts(engine: Engine) -> None:
    with engine.begin() as connection:
        for number in range(50):
            api_keys.add(connection, ApiKey(f"{number:02}"), f"fb_{number}")
        api_keys.note_use(connection, {f"{number:02}": 100 + number for number in range(40)} | {"nobody": 1})
    with engine.begin() as connection:
        api_keys.note_use(connection, {"00": 200, "01": 5, "45": 2**53})
    with engine.connect() as connection:
        used = {entry.key.id: entry.used_at for entry in api_keys.every(connection)}
    expected = {f"{number:02}": 100 + number if number < 40 else None for number in range(50)}
    assert used == {**expected, "00": 200, "45": 2**53}
