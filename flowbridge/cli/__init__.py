"""The commands that `main.py` names: each module is one of them, or what several share."""

# Exit codes beside 0.
FAILED = 1
INTERRUPTED = 130
UNUSABLE = 2  # settings or arguments that cannot be used


class Usage(Exception):
    """Arguments that cannot be used; one line."""
