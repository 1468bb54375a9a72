"""Base64 without padding, as Matrix writes keys and signatures; read with or without it."""

import base64
import binascii


def encode(raw: bytes, *, urlsafe: bool = False) -> str:
    text = base64.urlsafe_b64encode(raw) if urlsafe else base64.b64encode(raw)
    return text.decode().rstrip("=")


def decode(text: object, *, urlsafe: bool = False) -> bytes:
    """Raises ValueError for anything else than base64."""
    if not isinstance(text, str) or not text.isascii():
        raise ValueError("it is not base64")
    padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
    try:
        return base64.b64decode(padded, altchars=b"-_" if urlsafe else None, validate=True)
    except binascii.Error as error:
        raise ValueError(f"it is not base64: {error}") from None
