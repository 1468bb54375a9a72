"""Fixtures for more than one file."""

from pathlib import Path

import pytest

from flowbridge.settings import Settings
from tests.rig import MakeRig, Rooms


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting in the environment, and no `.env` in the folder."""
    for name in Settings.model_fields:
        for variable in (name.upper(), f"FLOWBRIDGE_{name.upper()}"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(f"{variable}_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flowbridge.db"


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def make(path: Path, rooms: Rooms) -> MakeRig:
    return MakeRig(f"sqlite:///{path}", rooms)
