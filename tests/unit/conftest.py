"""Fixtures for more than one file."""

from pathlib import Path

import pytest

from flowbridge.settings import Settings


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting in the environment, and no `.env` in the folder."""
    for name in Settings.model_fields:
        for variable in (name.upper(), f"FLOWBRIDGE_{name.upper()}"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(f"{variable}_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
