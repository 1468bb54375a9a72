"""flowbridge.store.json_columns: a history is read back as it was written, by the quick way and by the other."""

from typing import Any

import pytest

from flowbridge.store.json_columns import from_json, history_to_json, to_json


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"at": 1_700_000_000_000, "ms": 12, "status": 200}],
        [{"at": 1, "ms": 2, "status": 403, "errcode": "M_FORBIDDEN", "error": "„no“"}],
        [{"at": 1, "replayed": {"by": "cli:me"}, "status": 200}, {"at": 1, "ms": 2, "status": 200}],
    ],
)
def test_history_is_what_the_encoder_would_write(history: list[dict[str, Any]]) -> None:
    assert history_to_json(history) == to_json(history)
    assert from_json(history_to_json(history)) == history
