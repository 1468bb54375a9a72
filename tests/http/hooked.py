"""A bridge with hooks: they stand in its hooks.yaml, with secrets that tests know."""

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowbridge.models.timing import Timing
from tests.http.conftest import ROOM, Answer, Bridge, running
from tests.upstream import Upstream

SECRET = "fh_a-secret-of-a-hook-with-some-more-in-it"
GITHUB = "fh_the-secret-that-github-has-of-the-hook"
PATH = f"/hooks/any/{SECRET}"
Hook = dict[str, Any]


def hook(name: str, **more: Any) -> Hook:
    return {"name": name, "room": ROOM, "verification": {"secret": f"{SECRET}-{name}"}, **more}


def path_of(name: str) -> str:
    return f"/hooks/{name}/{SECRET}-{name}"


HOOKS: list[Hook] = [
    hook("any", verification={"secret": SECRET}),
    hook("signed", verification={"scheme": "github", "secret": GITHUB}),
    hook("chatty", source="slack"),
    hook("discord", source="discord"),
    hook("open", mentions="template", mention=["@al:hs"]),
    hook("closed", mentions="never", mention=["@al:hs"]),
    hook("on-call", mention=["@al:hs", "@room"]),
    hook("picky", ignore=["issues", "pull_request.opened"]),
    hook("own", template={"markdown": "**{{ payload.what }}** is {{ payload.state }}"}),
    hook("failing", template={"html": "{{ payload.what / 0 }}"}),
    hook("elsewhere", room="#alias:upstream"),
    hook("forgetful", keep_requests=0),
]


@contextmanager
def hooked(upstream: Upstream, folder: Path, *more: Mapping[str, Any], **values: Any) -> Iterator[Bridge]:
    """`more`: further hooks; each may replace one of the same name. `values`: as `running` has them."""
    hooks = {each["name"]: each for each in (*HOOKS, *more)}
    file = folder / "hooks.yaml"
    file.write_text(json.dumps(list(hooks.values())))  # which YAML is, too
    values.setdefault("timing", Timing(key_lookup_seconds=0.002))  # each refusal waits for a look
    with running(upstream, folder, hooks_file=file, **values) as bridge:
        yield bridge


def tell(bridge: Bridge, body: Any, *headers: str, path: str = PATH, method: str = "POST") -> Answer:
    """Tell a hook this: bytes, or JSON. Without Authorization, unless it is among the headers."""
    return bridge.ask(told(body, *headers, path=path, method=method), method)


def told(body: Any, *headers: str, path: str = PATH, method: str = "POST") -> bytes:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: bridge", *headers, f"Content-Length: {len(given)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + given


def signed(body: bytes, secret: str = GITHUB) -> str:
    """GitHub's header."""
    return f"X-Hub-Signature-256: sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def basic(password: str, name: str = "anybody") -> str:
    return f"Authorization: Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


def alert(*names: str, status: str = "firing", **more: Any) -> dict[str, Any]:
    """What Alertmanager sends of these alerts, each on an instance of its name."""
    ends = "0001-01-01T00:00:00Z" if status == "firing" else "2026-11-22T11:00:00Z"
    alerts = [
        {
            "status": status,
            "labels": {"alertname": "Down", "instance": name},
            "annotations": {"summary": f"{name} is down"},
            "startsAt": "2026-11-22T10:00:00Z",
            "endsAt": ends,
            "generatorURL": "http://prometheus/graph",
            "fingerprint": name,
        }
        for name in names
    ]
    return {
        "version": "4",
        "groupKey": '{}:{alertname="Down"}',
        "status": status,
        "receiver": "matrix",
        "groupLabels": {"alertname": "Down"},
        "commonLabels": {"alertname": "Down"},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "alerts": alerts,
        **more,
    }
