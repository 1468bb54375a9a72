"""Files on a real Synapse: every shape goes up and comes back byte for byte, and what is wrong is said to be so."""

import base64
import hashlib
import json
import re
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.integration.conftest import KEY, store_in
from tests.patience import PATIENCE
from tests.processes import serving

EVERY_BYTE = bytes(range(256)) * 5 + b"\r\n--boundary\r\n"
MIB = 1024 * 1024
LIMIT = 50 * MIB  # Synapse's own


def png(width: int = 640, height: int = 480, rows: bytes | None = None) -> bytes:
    """A red picture. `rows`: instead, a zero byte and three for each pixel of a row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress((b"\0" + b"\xff\0\0" * width) * height if rows is None else rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def noise(size: int) -> bytes:
    return secrets.token_bytes(64 * 1024) * (size // (64 * 1024)) + b"\0" * (size % (64 * 1024))


@pytest.fixture
def direct(synapse: LocalSynapse, owner: Account) -> Iterator[httpx.Client]:
    """The homeserver, past the bridge."""
    headers = {"Authorization": f"Bearer {owner.access_token}"}
    with httpx.Client(base_url=synapse.url, headers=headers, trust_env=False) as client:
        yield client


def stored(direct: httpx.Client, answer: httpx.Response) -> httpx.Response:
    """What the homeserver has under the address that an upload was answered with."""
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["content_uri", "info"]
    address = answer.json()["content_uri"].removeprefix("mxc://")
    return direct.get(f"/_matrix/client/v1/media/download/{address}").raise_for_status()


def buffer(data: bytes) -> dict[str, Any]:
    return {"type": "Buffer", "data": list(data)}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# up


@pytest.mark.parametrize(
    ("type_", "query", "expected"),
    [
        ("image/png", "", "image/png"),
        ("text/plain; charset=utf-16", "", "text/plain; charset=utf-16"),
        ("application/octet-stream", "?filename=cat.png", "application/octet-stream"),
        (None, "?filename=cat.png", "image/png"),
        (None, "", "application/octet-stream"),
        ("application/x-www-form-urlencoded", "?filename=cat.webp", "image/webp"),
        ("application/x-www-form-urlencoded", "?filename=cats.tar.gz", "application/octet-stream"),
    ],
)
def test_raw_bytes_keep_their_type(
    bridge: httpx.Client, direct: httpx.Client, type_: str | None, query: str, expected: str
) -> None:
    headers = {} if type_ is None else {"Content-Type": type_}
    seen = stored(direct, bridge.post(f"/media{query}", content=EVERY_BYTE, headers=headers))
    assert seen.content == EVERY_BYTE
    assert seen.headers["content-type"] == expected


@pytest.mark.parametrize("pieces", [1, 3, 2_000])
def test_body_without_a_length_arrives_whole(bridge: httpx.Client, direct: httpx.Client, pieces: int) -> None:
    data = noise(pieces * 700)
    size = len(data) // pieces
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    seen = stored(direct, bridge.post("/media", content=chunks, headers={"Content-Type": "image/png"}))
    assert hashlib.sha256(seen.content).digest() == hashlib.sha256(data).digest()


def test_first_file_of_a_form_is_taken(bridge: httpx.Client, direct: httpx.Client) -> None:
    files = {"first": ("grüße.png", EVERY_BYTE, "image/png"), "second": ("b.txt", b"other", "text/plain")}
    seen = stored(direct, bridge.post("/media", data={"note": "x" * 100_000}, files=files))
    assert seen.content == EVERY_BYTE
    assert seen.headers["content-type"] == "image/png"
    assert quote("grüße.png") in seen.headers["content-disposition"]


def test_name_in_the_query_wins_over_the_forms(bridge: httpx.Client, direct: httpx.Client) -> None:
    files = {"file": ("from-the-form.png", b"picture", "image/png")}
    seen = stored(direct, bridge.post("/media?filename=from-the-query.png", files=files))
    assert "from-the-query.png" in seen.headers["content-disposition"]


SHAPES = {
    "base64": ({"data": text(EVERY_BYTE)}, "application/octet-stream", None),
    "base64 of the other alphabet": ({"data": "-_8"}, "application/octet-stream", None),
    "base64 in lines": ({"data": "aGVs\r\nbG8=\n", "filename": "a.txt"}, "text/plain; charset=UTF-8", "a.txt"),
    "base64 with a label": (
        {"data": text(EVERY_BYTE), "content_type": "image/png", "filename": "cat.png"},
        "image/png",
        "cat.png",
    ),
    "data URL": ({"data": f"data:image/gif;base64,{text(EVERY_BYTE)}"}, "image/gif", None),
    "data URL alone": (f"data:image/gif;base64,{text(EVERY_BYTE)}", "image/gif", None),
    "data URL without base64": ("data:,a%20%26%20b", "text/plain;charset=US-ASCII", None),
    "Buffer": (buffer(EVERY_BYTE), "application/octet-stream", None),
    "Buffer in a message": (
        {"payload": buffer(EVERY_BYTE), "filename": "cat.png", "contentType": "image/x-cat", "_msgid": "a", "n": 1.5},
        "image/x-cat",
        "cat.png",
    ),
    "base64 in a message": ({"payload": {"data": text(EVERY_BYTE)}, "topic": "x"}, "application/octet-stream", None),
    "data URL in a message": ({"payload": f"data:image/gif;base64,{text(EVERY_BYTE)}"}, "image/gif", None),
}
DATA = {"base64 of the other alphabet": b"\xfb\xff", "base64 in lines": b"hello", "data URL without base64": b"a & b"}


@pytest.mark.parametrize("label", ["application/json", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("name", SHAPES)
def test_each_json_shape_holds_a_file(bridge: httpx.Client, direct: httpx.Client, name: str, label: str | None) -> None:
    body, type_, filename = SHAPES[name]
    headers = {} if label is None else {"Content-Type": label}
    seen = stored(direct, bridge.post("/media", content=json.dumps(body, indent=1), headers=headers))
    assert seen.content == DATA.get(name, EVERY_BYTE)
    assert seen.headers["content-type"] == type_
    assert (filename is None) == ("filename" not in seen.headers["content-disposition"])
    assert filename is None or filename in seen.headers["content-disposition"]


@pytest.mark.parametrize(
    "body",
    [
        '{"data": "aGVsbG8=", "more": 1}',
        '{"type": "Buffer", "data": [1, 2], "more": 1}',
        '{"data": [1, 2]}',
        '{"payload": "hello", "filename": "a.txt"}',
        '{"payload": {"msgtype": "m.text"}}',
        '"hello"',
        "[1, 2]",
        "{broken",
        "  {}  ",
    ],
)
def test_json_without_a_shape_is_the_file_itself(bridge: httpx.Client, direct: httpx.Client, body: str) -> None:
    seen = stored(direct, bridge.post("/media", content=body, headers={"Content-Type": "application/json"}))
    assert seen.text == body
    assert seen.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("type_", ["text/plain", "application/octet-stream", "application/ld+json"])
def test_json_under_another_label_is_the_file_itself(bridge: httpx.Client, direct: httpx.Client, type_: str) -> None:
    body = json.dumps({"data": "aGVsbG8="})
    assert stored(direct, bridge.post("/media", content=body, headers={"Content-Type": type_})).text == body


def test_json_that_looks_like_a_shape_goes_in_a_form(bridge: httpx.Client, direct: httpx.Client) -> None:
    body = b'{"data": "aGVsbG8="}'
    answer = bridge.post("/media", files={"file": ("real.json", body, "application/json")})
    assert stored(direct, answer).content == body


def test_api_key_uploads_as_the_bot(anyone: httpx.Client, direct: httpx.Client) -> None:
    answer = anyone.post("/media", content=b"picture", headers={"X-API-Key": KEY, "Content-Type": "image/png"})
    assert stored(direct, answer).content == b"picture"


# refused


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"data": "a"}, "/data"),
        ({"data": "aGVs*G8="}, "/data"),
        ({"data": "data:image/png;base64"}, "/data"),
        ({"data": "data:image/png;base64,ü"}, "/data"),
        ({"data": "aGVsbG8=", "filename": 7}, "/filename"),
        ({"payload": {"data": "?"}}, "/payload/data"),
        ({"type": "Buffer", "data": [0, 255, 256]}, "/data/2"),
        ({"type": "Buffer", "data": [0, -1]}, "/data/1"),
        ({"type": "Buffer", "data": [1.5]}, "/data/0"),
        ({"type": "Buffer", "data": ["1"]}, "/data/0"),
        ({"type": "Buffer", "data": [1] * 100_000 + [None]}, "/data/100000"),
        ({"payload": {"type": "Buffer", "data": [True]}}, "/payload/data/0"),
    ],
)
def test_broken_shape_is_refused_with_its_place(bridge: httpx.Client, body: Any, pointer: str) -> None:
    answer = bridge.post("/media", json=body)
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_BAD_JSON")
    (problem,) = answer.json()["flowbridge"]["problems"]
    assert problem["pointer"] == pointer


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("image/png", b""),
        ("application/json", b""),
        (None, b""),
        ("application/json", b'{"data": ""}'),
        ("application/json", b'{"type": "Buffer", "data": []}'),
        ("multipart/form-data", b"--b--\r\n"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"no form"),
        ("multipart/form-data; boundary=b", b"--b--\r\n"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n\r\n--b--\r\n',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nhalf of it',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"; filename="\xff"\r\n\r\nx\r\n--b--\r\n',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"X-A: b\r\n" * 100_000),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"a" * 100_000 + b": b\r\n"),
        ("no type", b"picture"),
        ("image/png\x01", b"picture"),
        ("image/pn\xfc", b"picture"),
        ("image/" + "x" * 300, b"picture"),
    ],
)
def test_what_is_no_file_is_refused(bridge: httpx.Client, content_type: str | None, body: bytes) -> None:
    headers = [] if content_type is None else [(b"Content-Type", content_type.encode("latin-1"))]
    answer = bridge.post("/media", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["errcode"] in ("M_INVALID_PARAM", "M_BAD_JSON", "M_UNKNOWN")


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "x" * 300])
def test_name_that_no_file_can_have_is_refused(bridge: httpx.Client, name: str) -> None:
    body = json.dumps({"data": "aGVsbG8=", "filename": name})
    assert bridge.post("/media", content=body).status_code == 400
    query = quote(name, errors="surrogatepass")
    if name != "\ud800":  # in a query it is no UTF-8, and read as a replacement character
        assert bridge.post(f"/media?filename={query}", content=b"x").status_code == 400


@pytest.mark.parametrize(
    ("name", "kept"), [("../../etc/passwd", "passwd"), ("C:\\cat.bin", "cat.bin"), ("/", ""), ("..", ""), ("", "")]
)
def test_folders_are_no_part_of_a_name(bridge: httpx.Client, direct: httpx.Client, name: str, kept: str) -> None:
    seen = stored(direct, bridge.post(f"/media?filename={quote(name, safe='')}", content=b"x"))
    assert seen.headers["content-disposition"] == f"attachment{f'; filename={kept}' if kept else ''}"


@pytest.mark.parametrize(
    ("headers", "errcode"),
    [
        ({}, "M_MISSING_TOKEN"),
        ({"Authorization": "Bearer syt_wrong"}, "M_UNKNOWN_TOKEN"),
        ({"X-API-Key": "fb_wrong"}, "M_UNKNOWN_TOKEN"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_who_may_not_call_is_told_before_a_file_is_read(
    anyone: httpx.Client, method: str, headers: dict[str, str], errcode: str
) -> None:
    path = "/media" if method == "POST" else "/media/localhost/abc"
    answer = anyone.request(method, path, headers=headers, content=b"x" if method == "POST" else None)
    assert (answer.status_code, answer.json()["errcode"]) == (401, errcode)


def test_compressed_body_is_refused(bridge: httpx.Client) -> None:
    answer = bridge.post("/media", content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


# too large


def chunks_of(size: int) -> Iterator[bytes]:
    piece = b"x" * MIB
    for _ in range(size // MIB):
        yield piece
    yield piece[: size % MIB]


def form_of(size: int) -> Iterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
    yield from chunks_of(size)
    yield b"\r\n--b--\r\n"


TOO_LARGE: dict[str, tuple[dict[str, str], Callable[[], Iterator[bytes]]]] = {
    "said so": ({"Content-Type": "image/png", "Content-Length": str(LIMIT + 1)}, lambda: chunks_of(LIMIT + 1)),
    "found out": ({"Content-Type": "image/png"}, lambda: chunks_of(LIMIT + 1)),
    "in a form": ({"Content-Type": "multipart/form-data; boundary=b"}, lambda: form_of(LIMIT + 1)),
    "beside a file": ({"Content-Type": "multipart/form-data; boundary=b"}, lambda: (b"\r\n" * MIB for _ in range(60))),
    "in JSON": ({"Content-Type": "application/json"}, lambda: iter([b"{", *chunks_of(33 * MIB)])),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_larger_than_the_homeserver_takes_is_a_413(bridge: httpx.Client, case: str) -> None:
    headers, content = TOO_LARGE[case]
    answer = bridge.post("/media", content=content(), headers=headers)
    assert (answer.status_code, answer.json()["errcode"]) == (413, "M_TOO_LARGE")


def test_file_as_large_as_the_homeserver_takes(bridge: httpx.Client, direct: httpx.Client) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = bridge.post("/media", content=form_of(LIMIT), headers=headers)
    assert len(stored(direct, answer).content) == LIMIT


# down


@pytest.fixture(scope="module")
def picture(bridge_url: str, owner: Account) -> str:
    """`server/mediaId` of a PNG."""
    headers = {"Authorization": f"Bearer {owner.access_token}", "Content-Type": "image/png"}
    answer = httpx.post(f"{bridge_url}/media?filename=red.png", content=png(), headers=headers, trust_env=False)
    return str(answer.json()["content_uri"]).removeprefix("mxc://")


@pytest.mark.parametrize("suffix", ["", "/other.png", "/gr%C3%BC%C3%9Fe.png"])
def test_file_comes_back(bridge: httpx.Client, picture: str, suffix: str) -> None:
    answer = bridge.get(f"/media/{picture}{suffix}")
    assert answer.content == png()
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(png()))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox;")
    expected = f"utf-8''{suffix[1:]}" if "%" in suffix else suffix[1:] or "red.png"
    assert answer.headers["content-disposition"].partition("=")[::2] == (
        f"inline; filename{'*' if '%' in suffix else ''}",
        expected,
    )


def test_head_tells_about_the_file(bridge: httpx.Client, picture: str) -> None:
    answer = bridge.head(f"/media/{picture}")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(png()))


def test_file_that_did_not_change_is_a_304(bridge: httpx.Client, picture: str) -> None:
    tag = bridge.get(f"/media/{picture}").headers["etag"]
    assert bridge.get(f"/media/{picture}", headers={"If-None-Match": tag}).status_code == 304


def test_page_is_saved_not_shown(bridge: httpx.Client) -> None:
    uploaded = bridge.post("/media", content=b"<script>alert(1)</script>", headers={"Content-Type": "text/html"})
    answer = bridge.get(f"/media/{uploaded.json()['content_uri'].removeprefix('mxc://')}")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "script-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("method", ["scale", "crop"])
def test_thumbnail_is_a_smaller_picture(bridge: httpx.Client, picture: str, method: str) -> None:
    answer = bridge.get(f"/media/{picture}/thumbnail", params={"width": 32, "height": 32, "method": method})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert struct.unpack(">II", answer.content[16:24]) < (640, 480)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_api_key_downloads_as_the_bot(anyone: httpx.Client, picture: str) -> None:
    assert anyone.get(f"/media/{picture}", headers={"X-API-Key": KEY}).content == png()


@pytest.mark.parametrize("version", ["r0", "v1", "v3"])
@pytest.mark.parametrize("way", ["header", "query", "key"])
def test_old_paths_serve_who_has_a_token(
    anyone: httpx.Client, owner: Account, picture: str, version: str, way: str
) -> None:
    headers = {"header": {"Authorization": f"Bearer {owner.access_token}"}, "key": {"X-API-Key": KEY}}.get(way, {})
    params = {"access_token": owner.access_token} if way == "query" else {}
    base = f"/_matrix/media/{version}"
    assert anyone.get(f"{base}/download/{picture}", headers=headers, params=params).content == png()
    assert anyone.get(f"{base}/download/{picture}/a.png", headers=headers, params=params).content == png()
    size: dict[str, Any] = {"width": 32, "height": 32, **params}
    assert anyone.get(f"{base}/thumbnail/{picture}", headers=headers, params=size).status_code == 200


def test_old_paths_without_a_token_are_the_homeservers(
    anyone: httpx.Client, synapse: LocalSynapse, picture: str
) -> None:
    """Synapse keeps what was uploaded since its media became private from those without a token."""
    path = f"/_matrix/media/v3/download/{picture}"
    answers = [anyone.get(path), httpx.get(f"{synapse.url}{path}", trust_env=False)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize(
    "path",
    [
        "/media/localhost/%2e%2e",
        "/media/localhost/..%2F..%2Fetc",
        "/media/localhost/a%00b",
        "/media/localhost/a%2Fb",
        "/media/localhost/%ff",
        "/media/%2e%2e/abc",
        "/media/local%2Fhost/abc",
        "/media/evil.example%23/abc",
        "/media/evil@localhost/abc",
        "/media/localhost:x/abc",
        "/media//abc",
        "/media/localhost/",
        "/media/localhost/abc/..%2Fx",
        "/media/localhost/abc/a%5Cb",
        "/media/localhost/abc/%0d%0aSet-Cookie:a",
        "/media/localhost/abc/thumbnail?width=x&height=3",
        "/media/localhost/abc/thumbnail?width=-1&height=3",
        "/media/localhost/abc/thumbnail?width=99999999999999999999&height=3",
        "/media/localhost/abc/thumbnail?width=3&height=3&method=evil",
        "/media/localhost/abc?timeout_ms=1e400",
        "/_matrix/media/v3/download/localhost/%2e%2e",
    ],
)
def test_path_tricks_are_refused(bridge: httpx.Client, path: str) -> None:
    answer = bridge.get(path)
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_INVALID_PARAM")


def test_missing_file_is_the_homeservers_404(bridge: httpx.Client) -> None:
    answer = bridge.get("/media/localhost/nothing")
    assert (answer.status_code, answer.json()["errcode"]) == (404, "M_NOT_FOUND")


def test_thumbnail_without_a_size_is_the_homeservers_400(bridge: httpx.Client, picture: str) -> None:
    answer = bridge.get(f"/media/{picture}/thumbnail?width=&height=")
    assert (answer.status_code, answer.json()["errcode"]) == (400, "M_MISSING_PARAM")


# streamed

GROWTH = 5 * MIB


def status(pid: int, name: str) -> int:
    """A figure of /proc/PID/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_file(synapse: LocalSynapse, owner: Account, tmp_path: Path) -> None:
    bridge = serving(
        BASE_URL=synapse.url,
        ACCESS_TOKEN=owner.access_token,
        FLOWBRIDGE_API_KEYS=KEY,
        FLOWBRIDGE_DATABASE_URL=store_in(tmp_path),
    )
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    raw = {"Content-Type": "image/png"}
    with (
        bridge as (url, process),
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}, trust_env=False, timeout=PATIENCE) as client,
    ):

        def up_and_down(size: int) -> None:
            length = {"Content-Length": str(size)}
            for headers, content in [(raw | length, chunks_of(size)), (raw, chunks_of(size)), (form, form_of(size))]:
                answer = client.post("/media", content=content, headers=headers)
                assert answer.status_code == 200, answer.text
                back = client.get(f"/media/{answer.json()['content_uri'].removeprefix('mxc://')}")
                assert len(back.content) == size

        up_and_down(2 * MIB)
        before = status(process.pid, "VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        up_and_down(20 * MIB)
        grown = status(process.pid, "VmHWM") - before
    assert grown < GROWTH, f"{grown / MIB:.1f} MiB more than before"
