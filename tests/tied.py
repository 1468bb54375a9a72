"""Become a command that the kernel kills when its parent ends: also by that one's kill -9, also while it is stopped.

Run as a file, before the command, because it must be quick: `python -I -S tied.py PARENT COMMAND…`.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
SIGKILL = 9


def main(parent: int, argv: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            sys.exit(1)
    os.execvp(argv[0], argv)  # noqa: S606 - the command line of the run


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
