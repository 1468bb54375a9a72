"""How long tests wait.

A wait ends with what it waits for, so a long limit costs nothing in a test that passes. A short one makes the test
depend on the load of the machine: beside four busy loops on two cores, stalls of some seconds are usual.
"""

import time
from collections.abc import Callable

PATIENCE = 60.0  # seconds that a test waits for what should come at once


def until(condition: Callable[[], object], seconds: float = PATIENCE, *, else_: Callable[[], object] = str) -> None:
    """Wait for what other threads and processes do; `else_` describes what there is instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds:g} s: {else_()}"
        time.sleep(0.05)
