"""A bridge with hooks: they stand in its hooks.yaml, with secrets that tests know."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.http.conftest import ROOM, Answer, Bridge, running
from tests.upstream import Upstream

SECRET = "fh_a-secret-of-a-hook-with-some-more-in-it"
GITHUB = "fh_the-secret-that-github-has-of-the-hook"
HOOKS: list[dict[str, Any]] = [
    {"name": "any", "room": ROOM, "verification": {"secret": SECRET}},
    {"name": "generic", "room": ROOM, "source": "generic", "verification": {"secret": f"{SECRET}-generic"}},
    {"name": "signed", "room": ROOM, "verification": {"scheme": "github", "secret": GITHUB}},
]
PATH = f"/hooks/any/{SECRET}"


@contextmanager
def hooked(upstream: Upstream, folder: Path, *more: Mapping[str, Any], **values: Any) -> Iterator[Bridge]:
    """`more`: further hooks; each may replace one of the same name. `values`: as `running` has them."""
    hooks = {hook["name"]: hook for hook in (*HOOKS, *more)}
    file = folder / "hooks.yaml"
    file.write_text(json.dumps(list(hooks.values())))
    with running(upstream, folder, hooks_file=file, **values) as bridge:
        yield bridge


def tell(bridge: Bridge, body: Any, *headers: str, path: str = PATH, method: str = "POST") -> Answer:
    """Tell a hook this: bytes, or JSON. Without Authorization, unless it is among the headers."""
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: bridge", *headers, f"Content-Length: {len(given)}", "", ""]
    return bridge.ask("\r\n".join(lines).encode("latin-1") + given, method)


def signed(body: bytes, secret: str = GITHUB) -> str:
    """GitHub's header."""
    return f"X-Hub-Signature-256: sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def basic(password: str, name: str = "anybody") -> str:
    return f"Authorization: Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"
