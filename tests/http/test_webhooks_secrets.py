"""The canary: secrets of hooks are in no log line, answer, metric, delivery or file of the bridge in clear."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from flowbridge import log
from tests.http.conftest import KEY, RawClient, post
from tests.http.hooked import basic, hook, hooked, signed, told
from tests.upstream import Rooms, Upstream

CANARY = "canary"
TOKEN = "fh_canary_of_a_token_that_is_right_and_long"
OWN = "Canary/of+a=token?that#its%owner;chose"  # with what paths and headers must encode
SIGNING = "canary_of_a_secret_that_signs_requests"
WRONG = "fh_canary_of_a_token_that_is_wrong"
WRONG_OWN = "canary-of-a-wrong-token-without-a-prefix"
BODY = {"what": "x", "password": "canary_in_the_body", "headers": {"Authorization": "canary_of_a_monitor"}}


def requests() -> Iterator[bytes]:
    """Secrets in every place, right and wrong, at right and at wrong paths."""
    for number, token in enumerate((TOKEN, quote(OWN, safe=""), SIGNING, WRONG, WRONG_OWN, f"%{ord('c'):x}anary-more")):
        paths = [
            *(f"/hooks/plain/{token}", f"/hooks/chosen/{token}", f"/hooks/signed/{token}", f"/hooks/none/{token}"),
            *(f"/hooks/{token}", f"/hooks//{token}", f"/hooks/{token}/{token}", f"/hooks/plain/{token}/more"),
            *(f"/hook/plain/{token}", f"/HOOKS/plain/{token}", f"//hooks/plain/{token}", f"/hooks%2Fplain%2F{token}"),
            *(f"/webhook/{token}", f"/webhooks/{token}", f"/webhook/{token}/x", f"/api/v1/matrix/hook/{token}"),
            *(f"/services/T0/B0/{token}", f"/services/{token}", f"/services/T0/B0/{token}/x"),
            *(f"/api/webhooks/1/{token}", f"/api/webhooks/1/{token}/slack", f"/api/webhooks/1/{token}/github"),
            *(f"/hooks/plain/test/{token}", f"/hooks/plain/requests/{token}", f"/hooks/plain/requests/1/{token}"),
            *(
                f"/r/hooks/plain/{token}",
                f"/relay/hooks/none/{token}",
                f"/bridge/webhook/{token}",
                f"/x/services/{token}",
            ),
        ]
        for path in paths:
            for method in ("POST", "PUT", "GET", "DELETE", "OPTIONS"):
                yield told({**BODY, "n": number}, path=path, method=method)
            yield told(b"{", path=path)
            yield told(b"", path=f"{path}?token={token}")
        headers = [f"Authorization: Bearer {token}", basic(token), f"X-Gitlab-Token: {token}", f"X-Own-Secret: {token}"]
        for header in headers:
            for name in ("plain", "chosen", "signed", "none"):
                yield told({**BODY, "of": name}, header, path=f"/hooks/{name}")
                yield told(b"[1,", header, path=f"/hooks/{name}")
    body = json.dumps(BODY).encode()
    yield told(body, signed(body, SIGNING), "X-Other-Signature: canary_of_another", path="/hooks/signed")
    yield told(body, "X-Hub-Signature-256: canary", path="/hooks/signed")


@pytest.mark.parametrize("style", ["text", "json"])
def test_secrets_of_hooks_are_nowhere(
    upstream: Upstream, rooms: Rooms, tmp_path: Path, style: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(log._Json() if style == "json" else log._Text())
    logging.getLogger().addHandler(handler)
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    hooks = [
        hook("plain", verification={"secret": TOKEN}),
        hook("chosen", verification={"secret": OWN}),
        hook("signed", verification={"scheme": "github", "secret": SIGNING}),
    ]
    seen: list[str] = []
    try:
        with hooked(upstream, tmp_path, *hooks, wrong_keys_per_minute=100_000) as bridge:
            statuses = set()
            for request in requests():
                with RawClient(bridge.url) as client:
                    head = client.send(request).head()
                    statuses.add(head.split(" ")[1])
                    client.end()
                    seen += [head, (client.rest(5.0) or b"").decode()]
            assert {"200", "401", "404", "405", "400"} <= statuses
            assert "500" not in statuses
            bridge.wait_until_idle()
            for path in ("/metrics", "/deliveries?limit=200", "/deliveries?state=refused&limit=200", "/hooks"):
                seen.append(bridge.ask(post(path, b"", f"X-API-Key: {KEY}", method="GET")).body.decode())
            for delivery in json.loads(seen[-3])["deliveries"]:
                seen.append(json.dumps(bridge.delivery(delivery["delivery_id"])))
            assert rooms.events
            seen += [json.dumps(event.content) for event in rooms.events]
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(before)
    assert "hooks/plain/***" in lines.getvalue()
    for text in (*seen, *lines.getvalue().splitlines()):
        assert CANARY not in text.lower(), text
    for file in tmp_path.iterdir():
        if file.name != "hooks.yaml":
            assert CANARY.encode() not in file.read_bytes().lower(), file


@pytest.mark.parametrize("more", ["/x/y", "//", "/preview/x", "/requests/1/2"])
def test_path_of_nothing_does_not_tell_which_hooks_there_are(upstream: Upstream, tmp_path: Path, more: str) -> None:
    with hooked(upstream, tmp_path) as bridge:
        found = {bridge.ask(told({}, path=f"/hooks/{name}{more}")).body for name in ("any", "no-such-hook")}
    assert len(found) == 1
    assert b"there is nothing at" in found.pop()
