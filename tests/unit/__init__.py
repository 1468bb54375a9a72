"""One file for each module; nothing here starts a program or leaves the machine."""


class Clock:
    """Stands in for the `time` module of one module under test: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now
