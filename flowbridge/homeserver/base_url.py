"""A homeserver's base URL: what may be one, and what it means."""

import json
import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

MAX_ADDRESS_BYTES = 2_048

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?)*\.?")

_MATRIX = re.compile(r"(/_matrix(?:/client)?(?:/v3|/r0)?)/?$")
_HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?")


class AddressError(Exception):
    """BASE_URL, or what it points to, is wrong, and has to be corrected. One line."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to connect. `host` is a name, or an address without brackets."""

    host: str
    port: int
    tls: bool

    @property
    def authority(self) -> str:
        """What goes into `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"


@dataclass(frozen=True, slots=True)
class Address:
    """A homeserver's base URL: where to connect, and the path that goes before `/_matrix`."""

    origin: Origin
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.origin}{self.prefix}"


def parse_url(text: str, *, allow_http: bool) -> Address:
    """Read an http or https base URL. Raises AddressError."""
    if not is_plain(text):  # urlsplit drops tabs and line breaks silently
        raise AddressError(f"{shown(text)} is not an address")
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise AddressError(f"{shown(text)} is not an address: {error}") from None
    host = url.hostname or ""
    if url.scheme not in ("http", "https"):
        raise AddressError(f"{shown(text)} is neither https:// nor http://")
    if url.username is not None or url.password is not None:
        raise AddressError("the address holds a user name or password: use ACCESS_TOKEN")
    if url.query or url.fragment or "?" in text or "#" in text:
        raise AddressError(f"{shown(text)} has a query or fragment: a base URL has none")
    if not _is_host(host) or port == 0:
        raise AddressError(f"{shown(text)} names no valid host")
    if not re.fullmatch(r"(?:/[A-Za-z0-9._~-]+)*/?", url.path) or "/." in url.path:
        raise AddressError(f"{shown(text)} has a path that is not plain")
    if ends := _MATRIX.search(url.path):
        raise AddressError(f"{shown(text)} ends too late: the base URL stops before {ends[1]}")
    tls = url.scheme == "https"
    if not tls and not allow_http and not _is_loopback(host):
        raise AddressError(f"{shown(text)} would send tokens in clear text: use https://, or FLOWBRIDGE_ALLOW_HTTP=1")
    return Address(Origin(host, port or (443 if tls else 80), tls), url.path.rstrip("/"))


def parse_host(text: str) -> str:
    """Read a bare host, with or without a port. Raises AddressError."""
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None or not _is_host(found[1] or found[2]) or not 0 < int(found[3] or 1) < 65_536:
        raise AddressError(f"{shown(text)} is not a host name or URL")
    return text


def is_plain(text: str) -> bool:
    return 0 < len(text) <= MAX_ADDRESS_BYTES and text.isascii() and text.isprintable() and " " not in text


def _is_host(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return len(host) <= 253 and _HOST.fullmatch(host) is not None
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def shown(text: str) -> str:
    return json.dumps(text[:100])
