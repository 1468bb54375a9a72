"""What guards the bridge's edge: one credential a request, no foreign frames, and what can be switched off."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import upstream as scripted
from tests.http.conftest import HELLO, KEY, SEND, Bridge, running
from tests.upstream import Behaviour, Upstream

PAGE = b"<html><head></head><body>log in</body></html>"
GUARDS = {"x-frame-options": "DENY", "content-security-policy": "frame-ancestors 'none'"}
REGISTRATIONS = [
    "/register",
    "/_matrix/client/v3/register",
    "/_matrix/client/r0/register?kind=guest",
    "/_matrix/client/api/v1/register",
    "/_matrix/client/v1/register",
    "/_matrix/client/unstable/register",
    "/_matrix/client/v3/register/",
    "/_matrix/client/v3/%72egister",
    "/_matrix/client//v3//register",
    "/_matrix/client/v3%2Fregister",
    "/_matrix/client/v3/register/email/requestToken",
    "/_matrix/client/v3/register?user_id=@x:y",
]


def page(*headers: str) -> Behaviour:
    return scripted.raw(scripted.encoded(200, PAGE, *headers))


# credentials


@pytest.mark.parametrize("name", ["X-API-Key", "x-api-key"])
@pytest.mark.parametrize("target", [SEND, "/deliveries", "/_matrix/client/v3/sync", f"/_matrix/client/v3{SEND}"])
def test_two_different_api_keys_are_refused(bridge: Bridge, upstream: Upstream, name: str, target: str) -> None:
    method = "POST" if "send" in target else "GET"
    answer = bridge.post(
        target, b'"x"', f"X-API-Key: {KEY}", f"{name}: fb_other", "Authorization: Basic x", method=method
    )
    assert (answer.status, answer.json()["errcode"]) == (400, "M_INVALID_PARAM"), answer.body
    assert b"fb_" not in answer.body
    assert upstream.events == []


def test_two_different_authorizations_are_refused(bridge: Bridge, upstream: Upstream) -> None:
    for other in ("Bearer other", f"Bearer {KEY}", "Basic x"):
        answer = bridge.post(SEND, b'"x"', "Authorization: Bearer token", f"Authorization: {other}")
        assert (answer.status, answer.json()["errcode"]) == (400, "M_INVALID_PARAM")
    assert upstream.events == []


def test_same_credential_twice_is_one(bridge: Bridge) -> None:
    twice = (f"X-API-Key: {KEY}", f"X-API-Key:  {KEY} ", f"Authorization: Bearer {KEY}")
    assert bridge.post(SEND, b'"x"', *twice).status == 200
    other = ("X-Other: 1", "X-Other: 2", f"X-API-Key: {KEY}")
    assert bridge.post(SEND, b'"x"', *other).status == 200


# frames


@pytest.mark.parametrize(
    "path", ["/login/fallback", "/_matrix/client/v3/login/fallback", "/_matrix/client/r0/login/fallback"]
)
def test_login_page_keeps_what_protects_it(bridge: Bridge, upstream: Upstream, path: str) -> None:
    said = [
        "Content-Type: text/html",
        "X-Frame-Options: SAMEORIGIN",
        "Content-Security-Policy: frame-ancestors 'self'; base-uri 'self'",
        "Referrer-Policy: no-referrer",
    ]
    upstream.always(page(*said), at="/static/client/login")
    found = httpx.get(f"{bridge.url}{path}", trust_env=False)
    assert found.status_code == 200
    assert found.headers["x-frame-options"] == "SAMEORIGIN"
    assert found.headers["content-security-policy"] == "frame-ancestors 'self'; base-uri 'self'"
    assert found.headers["referrer-policy"] == "no-referrer"
    assert found.headers["x-content-type-options"] == "nosniff"
    upstream.always(page(said[0]), at="/static/client/login")
    found = httpx.get(f"{bridge.url}{path}", trust_env=False)
    assert GUARDS.items() <= dict(found.headers).items()


@pytest.mark.parametrize(
    "path",
    [
        "/_matrix/static/client/login/",
        "/_matrix/client/v3/login/sso/redirect",
        "/_matrix/client/v3/auth/m.login.recaptcha/fallback/web",
    ],
)
def test_page_that_passes_through_keeps_what_protects_it(bridge: Bridge, upstream: Upstream, path: str) -> None:
    said = [
        "Content-Type: text/html",
        "X-Frame-Options: DENY",
        "Content-Security-Policy: frame-ancestors 'none'",
    ]
    upstream.always(page(*said))
    found = httpx.get(f"{bridge.url}{path}", trust_env=False)
    assert GUARDS.items() <= dict(found.headers).items()
    assert found.content == PAGE


def test_documentation_is_shown_in_no_frame(bridge: Bridge) -> None:
    found = httpx.get(f"{bridge.url}/docs", trust_env=False)
    assert GUARDS.items() <= dict(found.headers).items()
    assert found.headers["x-content-type-options"] == "nosniff"


# what can be switched off


@pytest.fixture(scope="module")
def closed(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    folder: Path = tmp_path_factory.mktemp("closed")
    with running(shared_upstream, folder, registration=False, pass_federation=False) as bridge:
        yield bridge


@pytest.mark.parametrize("target", REGISTRATIONS)
def test_registration_that_is_off_is_a_403_by_every_path(closed: Bridge, upstream: Upstream, target: str) -> None:
    answer = closed.post(target, b'{"user_id": "x", "password": "y"}', "Authorization: Basic x")
    assert (answer.status, answer.json()["errcode"]) == (403, "M_FORBIDDEN"), answer.body
    assert upstream.events == []


@pytest.mark.parametrize("root", ["federation", "key", "%66ederation", "/federation"])
def test_federation_that_is_off_is_a_404(closed: Bridge, upstream: Upstream, root: str) -> None:
    for method in ("GET", "PUT"):
        answer = closed.post(f"/_matrix/{root}/v1/version", b"", "Authorization: Basic x", method=method)
        assert (answer.status, answer.json()["errcode"]) == (404, "M_UNRECOGNIZED"), answer.body
    assert upstream.requests == []


def test_nothing_else_is_switched_off_with_them(closed: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.answer({}), at="/_matrix/client/v3/")
    with httpx.Client(base_url=closed.url, headers={"Authorization": "Bearer t"}, trust_env=False) as caller:
        for path in ("/sync", "/rooms/!register:x/context/$e", "/user/@register:x/filter/1"):
            assert caller.get(f"/_matrix/client/v3{path}").status_code == 200, path
    upstream.script(None)
    with httpx.Client(base_url=closed.url, headers={"Authorization": "Bearer t2"}, trust_env=False) as caller:
        assert caller.post(SEND, json=HELLO).status_code == 200


def test_both_are_on_unless_switched_off(bridge: Bridge, upstream: Upstream) -> None:
    upstream.always(scripted.answer({"server": {}}))
    assert bridge.post("/_matrix/federation/v1/version", method="GET").status == 200
    assert bridge.post("/_matrix/key/v2/server", method="GET").status == 200
    assert bridge.post("/_matrix/client/v3/register", b"{}", "Authorization: Basic x").status == 200
