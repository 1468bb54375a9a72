"""Where the homeserver is (contract §2, `BASE_URL`).

m.tekos.co              asks https://m.tekos.co/.well-known/matrix/client; a 404 means https://m.tekos.co itself
https://hs.example.org  as it stands, also with a port or a path
http://127.0.0.1:8008   on loopback, or with FLOWBRIDGE_ALLOW_HTTP=1
s3://bucket/key         an object that holds one of the above (extra `s3`)
file:///path            a file that does
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import certifi

from flowbridge import log
from flowbridge.homeserver import well_known
from flowbridge.homeserver.base_url import (
    MAX_ADDRESS_BYTES,
    Address,
    AddressError,
    is_plain,
    parse_host,
    parse_url,
    shown,
)
from flowbridge.models.proxy import Proxy
from flowbridge.models.timing import Timing

WELL_KNOWN_REFRESH_SECONDS = 3_600.0
RETRY_SECONDS = 2.0  # after a failure, before the next attempt


class AddressUnknown(Exception):
    """The address cannot currently be learnt; a later attempt may succeed."""


class _WithAuthorities(ssl.SSLContext):
    """Reads its authorities for the first connection: they take 25 ms and 4 MB, and http:// needs none."""

    _are_read = False

    def wrap_bio(self, *args: Any, **more: Any) -> ssl.SSLObject:  # what asyncio and uvloop call
        if not self._are_read:
            self.load_default_certs()
            self.load_verify_locations(certifi.where())
            self._are_read = True
        return super().wrap_bio(*args, **more)


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """The system's authorities, certifi's, and the private one of FLOWBRIDGE_CA_FILE. Raises AddressError."""
    context = ssl.create_default_context(capath=os.devnull)  # which holds none; without it, the system's are read now
    context.__class__ = _WithAuthorities
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise AddressError(f"FLOWBRIDGE_CA_FILE: {ca_file} holds no certificate: {error}") from None
    return context


class Locator:
    """Knows the homeserver's address, and learns it again. Each of `on_change` is called with a new one."""

    def __init__(
        self,
        base_url: str,
        tls: ssl.SSLContext,
        *,
        allow_http: bool = False,
        proxy: Proxy | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self.proxy = proxy  # through which everything towards the homeserver goes
        self._tls = tls
        self._allow_http = allow_http
        self._base_url = base_url.strip()
        self._address: Address | None = None
        self._lock = asyncio.Lock()
        self._failed = ""
        self._retry_at = 0.0
        self._refresh_seconds = timing.address_refresh_seconds
        self.on_change: list[Callable[[Address], None]] = []
        self._find = self._finder(self._base_url)

    @property
    def known(self) -> Address | None:
        return self._address

    @property
    def refresh_seconds(self) -> float | None:
        """How often to ask for the address again; None when the settings hold it."""
        if "://" not in self._base_url:
            return WELL_KNOWN_REFRESH_SECONDS
        return self._refresh_seconds if self._base_url.startswith(("s3://", "file://")) else None

    async def address(self) -> Address:
        """The address, learnt at the first call. Raises AddressError or AddressUnknown."""
        if self._address is not None:
            return self._address
        async with self._lock:
            if self._address is None:
                if self._failed and time.monotonic() < self._retry_at:
                    raise AddressUnknown(self._failed)
                await self._learn()
        assert self._address is not None
        return self._address

    async def refresh(self) -> None:
        """Ask again. When that fails the address stays, and the log says why."""
        async with self._lock:
            try:
                await self._learn()
            except (AddressError, AddressUnknown) as error:
                log.warning("address_not_refreshed", error=error, address=self._address)

    async def keep_fresh(self) -> None:
        """Refresh on the interval, forever."""
        while (pause := self.refresh_seconds) is not None:
            await asyncio.sleep(pause)
            await self.refresh()

    async def _learn(self) -> None:
        try:
            address = await self._find()
        except AddressUnknown as error:
            self._failed, self._retry_at = str(error), time.monotonic() + RETRY_SECONDS
            raise
        if address != self._address:
            log.info("homeserver_address", address=address, was=self._address)
            self._address = address
            for follow in self.on_change:
                follow(address)

    def _finder(self, text: str) -> Callable[[], Awaitable[Address]]:
        """How this address is learnt. A malformed one raises AddressError here, before any request."""
        if not is_plain(text):
            raise AddressError(f"{shown(text)} is not an address")
        if text.startswith("s3://"):
            url = urlsplit(text)
            if not url.netloc or not url.path.strip("/"):
                raise AddressError(f"{shown(text)} does not have the form s3://bucket/key")
            return lambda: self._follow(lambda: _read_s3(url.netloc, url.path[1:]))
        if text.startswith("file://"):
            url = urlsplit(text)
            if url.netloc not in ("", "localhost") or not url.path.strip("/"):
                raise AddressError(f"{shown(text)} does not have the form file:///path")
            return lambda: self._follow(lambda: _read_file(Path(unquote(url.path))))
        return self._direct(text)

    def _direct(self, text: str) -> Callable[[], Awaitable[Address]]:
        if "://" in text:
            address = parse_url(text, allow_http=self._allow_http)

            async def known() -> Address:
                return address

            return known
        host = parse_host(text)
        return lambda: self._well_known(host)

    async def _follow(self, read: Callable[[], bytes]) -> Address:
        text = (await asyncio.to_thread(read)).decode("utf-8", "replace").strip()
        if text.startswith(("s3://", "file://")):
            raise AddressError(f"{self._base_url} holds {shown(text)}: it must hold the homeserver's own address")
        try:
            return await self._direct(text)()
        except AddressError as error:
            raise AddressError(f"{self._base_url} holds a wrong address: {error}") from None

    async def _well_known(self, host: str) -> Address:
        """Server discovery (specification, "Well-known URI")."""
        own = parse_url(f"https://{host}", allow_http=False)
        try:
            url, body = await well_known.ask(own, self._tls, self.proxy)
        except well_known.UnansweredError as error:
            raise AddressUnknown(str(error)) from None
        return own if body is None else self._announced(url, body)

    def _announced(self, url: str, body: bytes) -> Address:
        try:
            base_url = json.loads(body)["m.homeserver"]["base_url"]
            return parse_url(base_url, allow_http=self._allow_http)
        except AddressError as error:
            raise AddressUnknown(f"{url} announces a wrong address: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise AddressUnknown(f"{url} announces no m.homeserver.base_url") from None


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_ADDRESS_BYTES)
    except OSError as error:
        raise AddressError(f"file://{path}: {error.strerror}") from None


def _read_s3(bucket: str, key: str) -> bytes:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    except ImportError:
        raise AddressError("an s3:// address needs the extra s3: pip install 'flowbridge[s3]'") from None
    settings = Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 2})
    try:
        answer = boto3.client("s3", config=settings).get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(MAX_ADDRESS_BYTES)
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) >= 500:
            raise AddressUnknown(f"s3://{bucket}/{key}: {error}") from None
        raise AddressError(f"s3://{bucket}/{key}: {error}") from None
    except NoCredentialsError as error:
        raise AddressError(f"s3://{bucket}/{key}: {error}") from None
    except BotoCoreError as error:
        raise AddressUnknown(f"s3://{bucket}/{key}: {error}") from None
