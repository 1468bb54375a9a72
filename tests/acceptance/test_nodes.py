"""The Node-RED nodes: their own tests, with a real Node-RED, a real browser, a bridge and a homeserver."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import node

NODES = Path(__file__).parents[2] / "nodes"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 1_800  # seconds for all of them: they take one minute, and several on a busy machine


@pytest.fixture(scope="module")
def browser() -> str:
    """The program of a Chromium, which CHROMIUM names where it is not in PATH."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        node.missing(
            "no Chromium is found, so that the Node-RED nodes are NOT TESTED: install it, or name it by CHROMIUM"
        )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def installed() -> None:
    node.installed(NODES, "Node-RED")


@pytest.mark.timeout(PATIENCE + node.INSTALL_SECONDS + 100)
def test_nodes_pass_their_tests(browser: str, installed: None) -> None:
    environment = node.environment(CHROMIUM=browser, FLOWBRIDGE_PYTHON=sys.executable)
    command = [str(node.PROGRAMS / "npm"), "test"]
    with subprocess.Popen(
        command,
        cwd=NODES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            _end(process)
    assert process.returncode == 0, output


def _end(process: "subprocess.Popen[str]") -> None:
    """With all that it started, also when the test is interrupted."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
