"""Documents that are the same for every caller: serialised once, compressed once, answered with an ETag.

They need no token, so that anyone may ask for them as often as they like. Serialising the 787 KB that /openapi.json had
for each request took 25 ms of processor time, and 16 callers took 97 % of the sends.
"""

import asyncio
import gzip
import re
from collections.abc import Callable, Mapping
from hashlib import sha256

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.limits.tasks import Once

GZIP_LEVEL = 6
MIN_GZIP_BYTES = 512  # below this gzip saves little more than the header that announces it

_TAG = re.compile(r'(?:W/)?("[^"]*")')
_CODING = re.compile(r"\s*([^\s;,]+)\s*(?:;\s*q\s*=\s*(0(?:\.[0-9]*)?|1(?:\.0*)?)\s*)?")


class Document:
    """`make` returns the bytes; it is called once, for the first caller.

    All answers share one bytes object, and neither uvicorn nor uvloop copies it: 1,000 callers that do not read cost no
    more memory than one. `cache_control`: `no-cache` lets a cache keep the document, and revalidate it. `headers`:
    further ones, of the 200.
    """

    def __init__(
        self,
        make: Callable[[], bytes],
        media_type: str,
        *,
        cache_control: str = "no-cache",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._make = make
        self._media_type = media_type
        self._cache_control = cache_control
        self._headers = headers or {}
        self._forms: tuple[_Form, _Form] | None = None
        self._once: Once[str, tuple[_Form, _Form]] = Once()

    async def answer(self, request: Request) -> Response:
        """200 with the document or, when `If-None-Match` names what the caller would get, 304 without it."""
        plain, gzipped = self._forms or await self._made()
        headers = request.headers
        form = gzipped if accepts_gzip(",".join(headers.getlist("accept-encoding"))) else plain
        if matches(",".join(headers.getlist("if-none-match")), form.etag):
            return Response(status_code=304, headers=form.validators)
        return Response(form.body, headers={**form.headers, **self._headers}, media_type=self._media_type)

    async def _made(self) -> "tuple[_Form, _Form]":
        """Outside the event loop, which the OpenAPI document would block for 0.35 s."""
        self._forms = await self._once.get("", lambda: asyncio.to_thread(self._build))
        return self._forms

    def _build(self) -> "tuple[_Form, _Form]":
        body = self._make()
        plain = _Form(body, "", self._cache_control)
        packed = gzip.compress(body, GZIP_LEVEL, mtime=0) if len(body) >= MIN_GZIP_BYTES else body
        return plain, plain if len(packed) >= len(body) else _Form(packed, "gzip", self._cache_control)


class _Form:
    """The document in one content coding. Each has its own ETag, since a strong one stands for exact bytes."""

    def __init__(self, body: bytes, coding: str, cache_control: str) -> None:
        self.body = body
        self.etag = f'"{sha256(body).hexdigest()[:32]}"'
        # RFC 9110 §15.4.5: what a 304 repeats of the 200
        self.validators: Mapping[str, str] = {
            "ETag": self.etag,
            "Cache-Control": cache_control,
            "Vary": "Accept-Encoding",
        }
        coded = {"Content-Encoding": coding} if coding else {}
        self.headers: Mapping[str, str] = {**self.validators, **coded, "X-Content-Type-Options": "nosniff"}


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding allows gzip (RFC 9110 §12.5.3); malformed parts are ignored."""
    weights: dict[str, float] = {}
    for part in header[:1_000].lower().split(","):
        if found := _CODING.fullmatch(part):
            weights.setdefault(found[1], float(found[2] or 1))
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def matches(if_none_match: str, etag: str) -> bool:
    """Whether an If-None-Match names this ETag; weak ones match, too (RFC 9110 §13.1.2)."""
    return if_none_match.strip() == "*" or etag in _TAG.findall(if_none_match[:4_096])
