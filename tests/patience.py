"""How long tests wait.

A wait ends with what is waited for, so a long limit costs nothing where all is well; and a short one makes a test
depend on how busy the machine is: beside four busy loops on two cores a stall of some seconds is usual.
"""

import time
from collections.abc import Callable

PATIENCE = 60.0  # seconds that a test waits for something which should have come at once


def until(condition: Callable[[], object], seconds: float = PATIENCE, *, else_: Callable[[], object] = str) -> None:
    """Wait for what other threads and processes do; `else_` tells what there is instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds:g} s: {else_()}"
        time.sleep(0.05)
