"""The bridge's own address, as clients learn it."""

import re

from starlette.requests import Request

from flowbridge.settings import Settings

_HOST = re.compile(r"[A-Za-z0-9._~-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


def public_url(settings: Settings, request: Request) -> str:
    """Without a slash at its end: FLOWBRIDGE_PUBLIC_URL, else what the request came to (its scheme and `Host`)."""
    if settings.public_url is not None:
        return settings.public_url
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        name, port = request.scope["server"]
        host = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    return f"{request.scope['scheme']}://{host}"
