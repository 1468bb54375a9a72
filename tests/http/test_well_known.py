"""A host that is asked for its homeserver may send us elsewhere: where that is followed, and where it is not."""

import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbridge.homeserver import AddressUnknown, Locator, tls_context
from tests import upstream as scripted
from tests.http.conftest import Authority
from tests.upstream import Behaviour, Request, Upstream

PATH = "/.well-known/matrix/client"
ANNOUNCED = scripted.answer({"m.homeserver": {"base_url": "https://matrix.example.org"}})


@pytest.fixture(scope="module")
def trusted(authority: Authority) -> tuple[Path, ssl.SSLContext]:
    return authority("well-known")


@pytest.fixture
def host(trusted: tuple[Path, ssl.SSLContext]) -> Iterator[Upstream]:
    with Upstream(lambda _: ANNOUNCED, trusted[1]) as server:
        yield server


async def ask(host: Upstream, trusted: tuple[Path, ssl.SSLContext]) -> str:
    return str(await Locator(f"127.0.0.1:{host.port}", tls_context(trusted[0])).address())


def leads(host: Upstream, *locations: str, status: int = 302) -> None:
    """Each answer leads to the next of these; the last one announces."""
    targets = [PATH, *(location.partition(f":{host.port}")[2] or location for location in locations)]

    def script(request: Request) -> Behaviour:
        at = targets.index(request.target)
        return scripted.redirect(locations[at], status) if at < len(locations) else ANNOUNCED

    host.script(script)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_followed(host: Upstream, trusted: tuple[Path, ssl.SSLContext], status: int) -> None:
    leads(host, f"https://127.0.0.1:{host.port}/elsewhere?x=1", status=status)
    assert await ask(host, trusted) == "https://matrix.example.org"


async def test_three_redirects_are_followed_relative_ones_too_and_not_a_fourth(
    host: Upstream, trusted: tuple[Path, ssl.SSLContext]
) -> None:
    leads(host, "/one", "/two", "/three")
    assert await ask(host, trusted) == "https://matrix.example.org"
    leads(host, "/one", "/two", "/three", "/four")
    with pytest.raises(AddressUnknown, match="which is one redirect too many: 3 are followed"):
        await ask(host, trusted)


async def test_another_host_may_answer(trusted: tuple[Path, ssl.SSLContext], host: Upstream) -> None:
    with Upstream(lambda _: ANNOUNCED, trusted[1]) as other:
        host.always(scripted.redirect(f"https://127.0.0.1:{other.port}{PATH}"))
        assert await ask(host, trusted) == "https://matrix.example.org"
        (request,) = other.requests
        assert request.header("host") == f"127.0.0.1:{other.port}"
        other.always(scripted.answer({}, 404))
        assert await ask(host, trusted) == f"https://127.0.0.1:{host.port}"


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://elsewhere.example.org/", "leads to http://elsewhere.example.org/: that is not https://"),
        ("ftp://elsewhere.example.org/", "that is not https://"),
        ("https://[::1/", "that is not https://"),
        (PATH, "leads in a circle"),
        ("https://user:secret@127.0.0.1/", "holds a user name or password"),
        ("https://a b/", "is not an address"),
        ("", "answers 302"),
    ],
)
async def test_redirect_that_is_not_followed_says_why(
    host: Upstream, trusted: tuple[Path, ssl.SSLContext], location: str, says: str
) -> None:
    host.always(scripted.redirect(location))
    with pytest.raises(AddressUnknown) as caught:
        await ask(host, trusted)
    assert says in str(caught.value)
    assert f"https://127.0.0.1:{host.port}{PATH} answers 302" in str(caught.value)
    assert str(caught.value).isprintable()


async def test_circle_of_two_is_noticed(host: Upstream, trusted: tuple[Path, ssl.SSLContext]) -> None:
    host.script(lambda request: scripted.redirect("/two" if request.target == PATH else PATH))
    with pytest.raises(AddressUnknown, match="leads in a circle"):
        await ask(host, trusted)
    assert len(host.requests) == 2


async def test_long_answer_behind_a_redirect_is_cut_off(host: Upstream, trusted: tuple[Path, ssl.SSLContext]) -> None:
    long = json.dumps("x" * 70_000).encode()
    host.script(
        lambda request: (
            scripted.redirect("/long") if request.target == PATH else scripted.raw(scripted.encoded(200, long))
        )
    )
    with pytest.raises(AddressUnknown, match="/long answers more than 65536 bytes"):
        await ask(host, trusted)
