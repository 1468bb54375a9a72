"""How long tests wait.

A wait ends with what is waited for, so a long limit costs nothing where all is well; and a short one makes a test
depend on how busy the machine is: beside four busy loops on two cores a stall of some seconds is usual.
"""

import os
from pathlib import Path

PATIENCE = 60.0  # seconds that a test waits for something which should have come at once
_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """What a process has used of the processor so far, in steps of 10 ms: unlike the clock, the same on a busy machine.

    Only Linux tells (proc_pid_stat(5), fields 14 and 15).
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
