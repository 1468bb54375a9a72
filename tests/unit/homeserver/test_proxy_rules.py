"""What changes in a request, and in an answer, that passes through."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbridge.errors import BadRequest, NotJson
from flowbridge.homeserver import proxy_rules


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/_matrix/client/v3/sync", "/_matrix/client/v3/sync"),
        ("/_matrix/client/r0/sync", "/_matrix/client/v3/sync"),
        ("/_matrix/client/api/v1/pushrules/", "/_matrix/client/v3/pushrules/"),
        ("/_matrix/client/unstable/org.example/x", "/_matrix/client/unstable/org.example/x"),
        ("/_matrix/client/v1/rooms/!r/hierarchy", "/_matrix/client/v1/rooms/!r/hierarchy"),
        ("/_matrix/client/v3/profile/r0/", "/_matrix/client/v3/profile/r0/"),
        ("/_matrix/media/r0/download/hs/a%2Fb", "/_matrix/media/v3/download/hs/a%2Fb"),
        ("/_matrix/media/v1/upload", "/_matrix/media/v3/upload"),
        ("/_matrix/media/v1/create", "/_matrix/media/v1/create"),
        ("/_matrix/media/api/v1/upload", "/_matrix/media/api/v1/upload"),
        ("/_matrix/client/v3/directory/room/%23a%2fb:hs//", "/_matrix/client/v3/directory/room/%23a%2fb:hs//"),
        ("/_matrix/client/v3/x/...", "/_matrix/client/v3/x/..."),
    ],
)
def test_path_is_kept_but_for_the_old_dialects(path: str, expected: str) -> None:
    assert proxy_rules.target(path, b"") == expected


@pytest.mark.parametrize(
    "path",
    [
        "/_matrix/../_synapse/admin",
        "/_matrix/client/%2e%2e/x",
        "/_matrix/client/a%2F..%2Fb",
        "/_matrix/./x",
        "/_matrix/client/v3/profile/%00",
        "/_matrix/client/v3/profile/%0d%0aX:%20y",
    ],
)
def test_path_that_means_no_good_is_refused(path: str) -> None:
    with pytest.raises(BadRequest):
        proxy_rules.target(path, b"")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", ""),
        (b"access_token=x", ""),
        (b"a=1&access_token=x&b=2", "?a=1&b=2"),
        (b"access_token=x&access_token=y&ACCESS_TOKEN=z&acc%65ss_token=w", ""),
        (b"membership=&not_membership=leave", "?not_membership=leave"),
        (b"flag&since=s1%2F_2&filter=%7B%7D", "?flag&since=s1%2F_2&filter=%7B%7D"),
        (b"&&a=1&", "?a=1"),
        (b"q=\xc3\xbc", "?q=%C3%BC"),
        (b"a=1;access_token=x;user_id=@b:hs", "?a=1%3Baccess_token=x%3Buser_id=@b:hs"),
        (b";access_token=x", "?%3Baccess_token=x"),
    ],
)
def test_query_is_kept_but_for_tokens_and_blank_values(query: bytes, expected: str) -> None:
    assert proxy_rules.target("/_matrix/x", query) == f"/_matrix/x{expected}"


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        (b"timeout=30000", 30.0),
        (b"a=b&timeout=0", 0.0),
        (b"", 0.0),
        (b"timeout=-5", 0.0),
        (b"timeout=" + b"9" * 99, 3600),
    ],
)
def test_timeout_of_a_long_poll_is_read(query: bytes, seconds: float) -> None:
    assert proxy_rules.poll_seconds(query) == seconds


@pytest.mark.parametrize(
    ("method", "path", "ends"),
    [
        ("POST", "/_matrix/client/v3/logout/all/", True),
        ("POST", "/_matrix/client/r0/account/password", True),
        ("POST", "/_matrix/client/v3/account/%70assword", True),
        ("POST", "/_matrix/client/unstable/account/deactivate", True),
        ("POST", "/_matrix/client/v3/delete_devices", True),
        ("DELETE", "/_matrix/client/v3/devices/A%2FB", False),
        ("DELETE", "/_matrix/client/v3/devices/AB", True),
        ("PUT", "/_matrix/client/v3/devices/AB", False),
        ("GET", "/_matrix/client/v3/devices/AB", False),
        ("POST", "/_matrix/client/v3/account/password/email/requestToken", False),
        ("POST", "/_matrix/client/v3/account/%ff", False),
    ],
)
def test_requests_that_may_end_tokens_are_known(method: str, path: str, *, ends: bool) -> None:
    assert proxy_rules.ends_tokens(method, path) is ends


def test_request_headers_lose_what_is_not_for_the_homeserver() -> None:
    headers = [
        (b"host", b"bridge"),
        (b"connection", b"close, X-Mine"),
        (b"x-mine", b"1"),
        (b"te", b"trailers"),
        (b"transfer-encoding", b"chunked"),
        (b"authorization", b"Basic x"),
        (b"cookie", b"a=b"),
        (b"x-api-key", b"fb_x"),
        (b"x-forwarded-for", b"1.2.3.4"),
        (b"x-forwarded-anything", b"1"),
        (b"referer", b"/?access_token=x"),
        (b"content-length", b"3"),
        (b"content-type", b"image/png"),
        (b"accept", b"a"),
        (b"accept", b"b"),
    ]
    kept = [(b"content-type", b"image/png"), (b"accept", b"a"), (b"accept", b"b")]
    assert proxy_rules.request_headers(headers, None, has_body=False) == kept
    assert proxy_rules.request_headers(headers, "t", has_body=True) == [
        *kept,
        (b"authorization", b"Bearer t"),
        (b"content-length", b"3"),
    ]


def test_answer_headers_lose_what_is_of_the_connection() -> None:
    headers = [
        (b"connection", b"X-Mine"),
        (b"x-mine", b"1"),
        (b"keep-alive", b"5"),
        (b"transfer-encoding", b"chunked"),
        (b"set-cookie", b"a=b"),
        (b"date", b"now"),
        (b"x-bad", b"a\x01b"),
        (b"etag", b'"1"'),
        (b"content-encoding", b"gzip"),
        (b"content-length", b"3"),
    ]
    assert proxy_rules.answer_headers(headers) == [
        (b"etag", b'"1"'),
        (b"content-encoding", b"gzip"),
        (b"content-length", b"3"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1e400}',
        b'{"a":[-1E+400]}',
        b'{"a":"\\ud800"}',
        b'{"\\uDFFF":1}',
        b'{"a":1' + b"0" * 300 + b"e99}",
        b"[" * 9_999 + b"1e400",
        b"[" * 65_534 + b"1e400",
        b"[" * 65_381 + b"1" * 310 + b".0]",
    ],
)
def test_json_that_makes_a_homeserver_fail_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson):
        proxy_rules.check_body(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"order":0.25}',
        b'{"a":1e-400}',
        b'{"a":"\\ud83d\\ude00"}',
        b"\xff\\ud800",
        b"{",
        b"[" * 100_000 + b"1e40",
        b'{"a":"1e400"}',
        b'{"a":"\\\\ud800"}',
        b'{"a":' + b"9" * 400 + b"}",
        b"\x00\xeb1e400\xff",
        b"1e400 is a number",
        b'{"a":1e400,"b":"unfinished',
        bytes(range(256)) + b"1e400" + bytes(range(255, -1, -1)),
    ],
)
def test_any_other_body_is_for_the_homeserver_to_judge(body: bytes) -> None:
    proxy_rules.check_body(body)


MEGABYTES = 8 * 1024 * 1024
WORST = {
    "pairs of surrogates": (b'["', b"\\ud83d\\ude00", b'"]'),
    "pairs, each a string": (b"[", b'"\\ud83d\\ude00",', b"1]"),
    "quotes": (b'["', b'\\"', b'\\ud800"]'),
    "empty strings": (b"[", b'"",', b'"\\ud800"]'),
    "escapes": (b'["', b"\\n", b'\\ud800"]'),
    "lone surrogates": (b'["', b"\\ud800", b'"]'),
    "large numbers": (b"[", b"1e299,", b"1]"),
    "numbers at the limit": (b"[", b"1e308,", b"1]"),
    "long numbers": (b"[", b"9" * 210 + b".0,", b"1]"),
    "numbers": (b"[", b"-1.5e-3,", b"1e400]"),
    "integers": (b"[", b"1,", b"1e400]"),
    "literals": (b"[", b"true,", b"1e400]"),
    "brackets": (b"", b"[", b"1e400"),
    "a string without an end": (b'[1e400,"', b'\\"', b""),
    "strings of 33 pieces": (b"[1e400,", b'"' + b"\\n" * 33 + b'",', b"1]"),
}


@pytest.mark.parametrize("name", WORST)
def test_look_into_8_megabytes_takes_part_of_a_second_whatever_they_are(name: str) -> None:
    """Of the processor; a token at a time in Python it was up to 38 s."""
    begin, piece, end = WORST[name]
    body = begin + piece * ((MEGABYTES - len(begin) - len(end)) // len(piece)) + end
    started = time.process_time()
    with contextlib.suppress(NotJson):
        proxy_rules.check_body(body)
    assert time.process_time() - started < 1.5  # 0.1 to 0.5 on a quiet machine


@pytest.mark.parametrize("pieces", [1, 31, 32, 33, 64, 65, 1_024, 1_025, 5_000])
def test_fault_is_found_behind_any_number_of_pieces(pieces: int) -> None:
    for filling in (b"x", b"\\n", b"\\ud83d\\ude00", b"x\\n", b"x" * 64):
        for body in (b'["%b\\ud800"]', b'["%b",1e400]', b'["%b\\udc00\\ud83d"]'):
            with pytest.raises(NotJson):
                proxy_rules.check_body(body % (filling * pieces))
        proxy_rules.check_body(b'["\\ud83d\\ude00%b"]' % (filling * pieces))


LEAVES = st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-16"))


@settings(max_examples=50)
@given(st.recursive(LEAVES, st.lists, max_leaves=20))
def test_what_python_can_write_as_json_is_refused_when_a_homeserver_could_not_read_it(value: Any) -> None:
    body = json.dumps([value, "\U0001f600", 1e299]).replace("Infinity", "1e999").encode()
    if not any(map(math.isinf, _numbers(value))):
        proxy_rules.check_body(body)
    else:
        with pytest.raises(NotJson):
            proxy_rules.check_body(body)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value
