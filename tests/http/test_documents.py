"""What anyone may read: kept as bytes, compressed, with an ETag; and cheap, whoever does not read it to its end."""

import gzip
import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.http.conftest import Answer, Bridge, RawClient, post
from tests.processes import cpu_seconds, resident_bytes, serving
from tests.upstream import Upstream

DOCUMENTS = [
    "/openapi.json",
    "/docs",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/schemas",
    "/schemas/m.room.message",
    "/schemas/components/image_info.json",
]


def get(bridge: Bridge, path: str, *headers: str, method: str = "GET") -> Answer:
    return bridge.post(path, b"", *headers, method=method)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_document_is_compressed_for_a_caller_that_takes_it(bridge: Bridge, path: str) -> None:
    plain = get(bridge, path)
    packed = get(bridge, path, "Accept-Encoding: deflate, gzip;q=0.5")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert len(packed.body) < len(plain.body)
    assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
    assert plain.headers["content-type"] == packed.headers["content-type"]


@pytest.mark.parametrize("accepted", ["", "gzip;q=0", "identity", "br, *;q=0", "gzip;q=zero", "gzipped"])
def test_document_is_not_compressed_for_any_other_caller(bridge: Bridge, accepted: str) -> None:
    answer = get(bridge, "/openapi.json", f"Accept-Encoding: {accepted}")
    assert "content-encoding" not in answer.headers
    assert json.loads(answer.body)["openapi"].startswith("3.1")


@pytest.mark.parametrize("path", DOCUMENTS)
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_document_that_the_caller_has_is_not_sent_again(bridge: Bridge, path: str, coding: str) -> None:
    accepts = f"Accept-Encoding: {coding}"
    first = get(bridge, path, accepts)
    etag = first.headers["etag"]
    assert etag.startswith('"')
    assert first.headers["cache-control"]
    for named in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        with bridge.connect() as client:
            client.send(post(path, b"", accepts, f"If-None-Match: {named}", method="GET"))
            head = client.head().lower()
            assert head.startswith("http/1.1 304 ")
            assert "content-length" not in head
            assert "transfer-encoding" not in head
            assert f"etag: {etag}" in head
            assert client.send(post("/healthz", method="GET")).answer().status == 200  # no body lies in between
    assert get(bridge, path, accepts, 'If-None-Match: "other"').body == first.body


def test_each_coding_has_an_etag_of_its_own(bridge: Bridge) -> None:
    plain, packed = get(bridge, "/openapi.json"), get(bridge, "/openapi.json", "Accept-Encoding: gzip")
    assert plain.headers["etag"] != packed.headers["etag"]
    assert get(bridge, "/openapi.json", f"If-None-Match: {packed.headers['etag']}").status == 200


@pytest.mark.parametrize("path", DOCUMENTS)
def test_head_of_a_document_has_its_length(bridge: Bridge, path: str) -> None:
    head = get(bridge, path, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) == len(get(bridge, path).body)


def test_asset_that_is_not_there_is_a_404(bridge: Bridge) -> None:
    assert get(bridge, "/docs/nothing.js").status == 404


def test_document_costs_its_bytes_and_no_more(upstream: Upstream, tmp_path: Path) -> None:
    """10 ms of processor time each before they were kept: serialized for each request."""
    with serving(cwd=tmp_path, BASE_URL=upstream.url) as (url, process), RawClient(url) as client:
        request = post("/openapi.json", b"", "Accept-Encoding: gzip", method="GET")
        client.send(request).answer()
        before = cpu_seconds(process.pid)
        for _ in range(200):
            assert client.send(request).answer().status == 200
        assert cpu_seconds(process.pid) - before < 200 * 0.004


def test_callers_that_do_not_read_share_one_copy(upstream: Upstream, tmp_path: Path) -> None:
    """300 times 400 kB are 120 MB when each connection has a copy of its own."""
    with serving(cwd=tmp_path, BASE_URL=upstream.url) as (url, process), ExitStack() as stack:
        with RawClient(url) as client:
            client.send(post("/openapi.json", method="GET")).answer()
        before = resident_bytes(process.pid)
        clients = [stack.enter_context(RawClient(url)) for _ in range(300)]
        for client in clients:
            client.send(post("/openapi.json", method="GET"))
        for client in clients:
            assert client.head().startswith("HTTP/1.1 200 ")
        with RawClient(url) as client:
            assert client.send(post("/healthz", method="GET")).answer().status == 200
        assert resident_bytes(process.pid) - before < 40_000_000
