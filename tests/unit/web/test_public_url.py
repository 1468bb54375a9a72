"""flowbridge.web.public_url: how clients are told where the bridge is."""

import pytest
from starlette.requests import Request

from flowbridge.settings import Settings
from flowbridge.web.public_url import public_url


def told(host: str | None, *, server: str = "127.0.0.1", scheme: str = "http", setting: str | None = None) -> str:
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    request = Request({"type": "http", "headers": headers, "server": (server, 8090), "scheme": scheme})
    return public_url(Settings.model_construct(public_url=setting), request)


@pytest.mark.parametrize("host", ["bridge.example.org", "localhost:8090", "10.0.0.1:80", "[::1]:8090", "[fe80::1]"])
def test_it_is_what_the_request_came_to(host: str) -> None:
    assert told(host) == f"http://{host}"
    assert told(host, scheme="https") == f"https://{host}"


@pytest.mark.parametrize(
    "host", [None, "", "a b", "a/b", "a@b", 'a"', "a?b", "a#b", "a:b", "a:1:2", "ä", "[::1", "a\t"]
)
def test_host_that_is_none_is_not_repeated(host: str | None) -> None:
    assert told(host) == "http://127.0.0.1:8090"
    assert told(host, server="::1") == "http://[::1]:8090"


def test_setting_wins() -> None:
    assert told("evil.example.org", setting="https://bridge.example.org") == "https://bridge.example.org"
