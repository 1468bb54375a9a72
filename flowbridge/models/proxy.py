"""A proxy on the way to the homeserver, as FLOWBRIDGE_PROXY names it."""

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

MAX_CREDENTIAL_BYTES = 255  # RFC 1929, for SOCKS5

_FORM = (
    "http://host:port, https://host:port or socks5://host:port, with user:password@ before the host if it wants them"
)
_PROXY = re.compile(
    r"(?P<scheme>https?|socks5h?)://(?:(?P<user>[\x21-\x7e]*?)(?::(?P<password>[\x21-\x7e]*))?@)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})/?"
)


@dataclass(frozen=True, slots=True)
class Proxy:
    """`str()` of it is without its password and its user."""

    scheme: str
    host: str
    port: int
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, which does not quote the text: it may hold a password."""
        found = _PROXY.fullmatch(text)
        if found is None or not 0 < int(found["port"]) < 65_536:
            raise ValueError(f"a proxy is {_FORM}")
        user, password = unquote(found["user"] or ""), unquote(found["password"] or "")
        if ":" in user or not f"{user}{password}".isprintable():
            raise ValueError(f"the proxy's user holds a colon, or a character that cannot be sent: it is {_FORM}")
        if max(len(user.encode()), len(password.encode())) > MAX_CREDENTIAL_BYTES:
            raise ValueError(f"the proxy's user and password have at most {MAX_CREDENTIAL_BYTES} bytes each")
        scheme = "socks5" if found["scheme"].startswith("socks5") else found["scheme"]
        return cls(scheme, found["host"].strip("[]"), int(found["port"]), user, password)

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"
