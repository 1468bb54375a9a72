"""End-to-end encryption: devices of the bridge, what they encrypt and what they read.

This room alone knows Olm and Megolm, and in it `olm.py` alone knows the library. It is empty of both unless the extra
`e2ee` is installed.
"""

from importlib.util import find_spec

LIBRARY = "vodozemac"


def is_installed() -> bool:
    """Whether the extra `e2ee` is there."""
    return find_spec(LIBRARY) is not None
