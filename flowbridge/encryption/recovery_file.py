"""Showing the recovery key, which is shown once: on a terminal, otherwise in a 0600 file that the log names."""

import os
import sys
from pathlib import Path

from flowbridge import log


class Shown:
    """`path`: the file. Called with the key before it counts for anything: a key that was used cannot be lost.

    Raises OSError where it cannot be shown; a file that is there already is not overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, recovery_key: str) -> None:
        if sys.stderr.isatty():
            self._show(recovery_key)
        else:
            self._write(recovery_key)

    def _show(self, recovery_key: str) -> None:
        print(
            f"\nThe recovery key of the bridge's account. It is shown only now:\n\n    {recovery_key}\n\n"
            "With it another device of the account is signed, in a client or by `flowbridge device recover`.\n",
            file=sys.stderr,
            flush=True,
        )

    def _write(self, recovery_key: str) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{recovery_key}\n")
            file.flush()
            os.fsync(descriptor)
        log.info(
            "recovery_key",
            file=str(self._path),
            hint="it signs other devices of the bridge's account: keep it elsewhere, then delete this file",
        )
