"""What a user gets: the wheel."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.processes import REPOSITORY


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([sys.executable, *command, str(REPOSITORY)], capture_output=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))
