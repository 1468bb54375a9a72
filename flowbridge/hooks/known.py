"""A hook as a request finds it: with the secrets that hold at present."""

from dataclasses import dataclass

from flowbridge.models.hooks import Hook

PREFIX = "fh_"  # of the secrets that we make: what stands in a path in this place begins with it, or is looked up


@dataclass(frozen=True, slots=True)
class Secret:
    """`digest`: its SHA-256. `text`: itself, where a signature is made with it; "" for a bare token."""

    digest: bytes
    text: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """A hook, and one or two secrets, the newest first."""

    hook: Hook
    secrets: tuple[Secret, ...]
