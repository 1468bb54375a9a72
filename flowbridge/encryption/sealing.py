"""What is kept of a device is encrypted with the secret key: JSON by Fernet, the library's objects by its pickles."""

import base64
import json
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flowbridge.encryption.olm import PICKLE_KEY_BYTES, CryptoError

_INFO = b"flowbridge: pickles of Olm and Megolm"


class Seal:
    """`secret`: the Fernet key of FLOWBRIDGE_SECRET_KEY. Raises ValueError for another text."""

    def __init__(self, secret: str) -> None:
        self._fernet = Fernet(secret)
        raw = base64.urlsafe_b64decode(secret)
        self.pickle_key = HKDF(SHA256(), PICKLE_KEY_BYTES, salt=None, info=_INFO).derive(raw)

    def close(self, value: Any) -> str:
        """A JSON value, unreadable, and not to be changed, without the key."""
        return self._fernet.encrypt(json.dumps(value, separators=(",", ":")).encode()).decode()

    def open(self, sealed: str) -> Any:
        """Raises CryptoError under another key."""
        try:
            return json.loads(self._fernet.decrypt(sealed))
        except InvalidToken:
            raise CryptoError(
                "what is kept of the device was written with another FLOWBRIDGE_SECRET_KEY: set that one, or make "
                "another device by `flowbridge device setup --reset`"
            ) from None
