"""The commands of the guide, run as they are written there. Only the host and the results of earlier ones differ."""

import json
import shlex
import shutil
import subprocess
from typing import Any

import pytest

from tests.patience import PATIENCE

GUIDE_HOST = "http://localhost:8008"


def curl(line: str, url: str, **instead: str) -> Any:
    """Run a line of the guide against `url`; the JSON that it prints. `instead`: replacements for words in it."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for word, text in {GUIDE_HOST: url, **instead}.items():
        assert word in line, f"{word} is not in {line}"
        line = line.replace(word, text)
    done = subprocess.run([*shlex.split(line), "-sS"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return json.loads(done.stdout)
