"""The house rules that a machine can hold."""

import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE

PROJECT = Path(__file__).parents[1]


def test_imports_go_down_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=PROJECT, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stdout


def test_sending_loads_nothing_that_it_does_not_need() -> None:
    """What is imported lazily costs neither memory nor a slow start."""
    script = "import sys, flowbridge.web.server; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=4 * PATIENCE, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"boto3", "synapse", "twisted", "rich", "httpx", "jsonschema", "pytest", "alembic", "psycopg"}
