"""flowbridge.homeserver.answers: what an answer of the homeserver means."""

import json
import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbridge.errors import BadGateway, GatewayTimeout, HomeserverError, MatrixError
from flowbridge.homeserver import answers
from flowbridge.homeserver.connection import NoAnswer, TimedOut, Unreachable
from flowbridge.homeserver.pool import Answer

HTML = b"<html><body>502 Bad Gateway</body></html>"


def answer(status: int, body: Any = b"", **headers: str) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    pairs = tuple((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())
    return Answer(status, pairs, raw)


def limited(body: Any = None, **headers: str) -> MatrixError:
    return answers.error(answer(429, {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many", **(body or {})}, **headers))


# a success


def test_200_gives_its_event_id() -> None:
    assert answers.event_id(answer(200, {"event_id": "$x", "more": 1})) == "$x"


_IDS = st.text() | st.text('$:azAZ09-_./+ \\"\x7f', min_size=1)


@settings(max_examples=500, deadline=None)
@given(_IDS, st.sampled_from([(",", ":"), (", ", ": "), (",", " : ")]), st.booleans())
def test_short_reading_of_an_event_id_is_that_of_json(name: str, separators: tuple[str, str], ascii_: bool) -> None:
    body = json.dumps({"event_id": name}, separators=separators, ensure_ascii=ascii_).encode("utf-8", "surrogatepass")
    for spelled in (body, body + b"\n", body[:-1] + b',"event_id":"$2"}', body.replace(b"event_id", b"event_\\u0069d")):
        assert _id_of(answer(200, spelled)) == _id_of(answer(200, b" " + spelled))  # a blank in front: read as JSON


def _id_of(found: Answer) -> str:
    try:
        return answers.event_id(found)
    except MatrixError as error:
        return error.error


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'"$x"', b"null", b'{"event_id": ""}', b'{"event_id": 5}', HTML, b"\xff"]
)
def test_200_without_an_event_id_is_a_bad_gateway(body: bytes) -> None:
    with pytest.raises(BadGateway, match="event_id"):
        answers.event_id(answer(200, body))


def test_200_gives_its_object() -> None:
    assert answers.success(answer(200, {"user_id": "@a:b"})) == {"user_id": "@a:b"}


@pytest.mark.parametrize("body", [b"[1]", b"", HTML, b'{"name": "cut o', b'{"a": NaN}', b"\xff", b'"{}"'])
def test_200_without_an_object_is_a_bad_gateway(body: bytes) -> None:
    with pytest.raises(BadGateway):
        answers.success(answer(200, body))


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 400, 401, 404, 429, 500, 503])
def test_every_other_status_is_an_error(status: int) -> None:
    with pytest.raises(MatrixError):
        answers.event_id(answer(status, {"event_id": "$x"}))
    with pytest.raises(MatrixError):
        answers.success(answer(status, {"user_id": "@a:b"}))


# the homeserver's own errors


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 500, 503])
def test_matrix_error_passes_with_its_status_errcode_text_and_extra_keys(status: int) -> None:
    body = {"errcode": "M_X", "error": "No.", "soft_logout": True, "room_version": "10", "admin": None}
    error = answers.error(answer(status, body))
    assert isinstance(error, HomeserverError)
    assert (error.status, error.body()) == (status, body)


@pytest.mark.parametrize(
    "extra", [{"status": 999}, {"self": 1}, {"args": [1]}, {"extra": 1, "body": 2}, {"headers": 3, "a b": 4}]
)
def test_extra_keys_of_any_name_do_no_harm(extra: dict[str, Any]) -> None:
    error = answers.error(answer(403, {"errcode": "M_X", "error": "No.", **extra}))
    assert (error.status, error.errcode, error.error) == (403, "M_X", "No.")
    assert error.headers() == {}


@pytest.mark.parametrize("text", [None, 5, ["No."], ...])
def test_matrix_error_without_a_text_still_has_one(text: Any) -> None:
    body = {"errcode": "M_X"} if text is ... else {"errcode": "M_X", "error": text}
    error = answers.error(answer(403, body))
    assert (error.status, error.errcode) == (403, "M_X")
    assert isinstance(error.error, str)
    assert error.error


@pytest.mark.parametrize(
    "pause", [10**400, -(10**400), 10**12, -5, True, 0, "5", 1.5, [1]], ids=lambda pause: str(pause)[:9]
)
def test_any_retry_after_ms_of_any_error_can_be_answered(pause: Any) -> None:
    error = answers.error(answer(403, {"errcode": "M_X", "error": "No.", "retry_after_ms": pause}))
    assert error.status == 403
    assert all(value.isdigit() for value in error.headers().values())


# what no homeserver says


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (301, {"errcode": "M_X", "error": "moved"}),
        (302, b""),
        (204, b""),
        (400, b""),
        (404, {"error": "no errcode"}),
        (403, {"errcode": 5, "error": "x"}),
        (403, {"errcode": None}),
        (502, HTML),
        (404, HTML),
        (503, b'"M_X"'),
        (500, b"[" * 100_000),
        (500, b'{"errcode":' * 100_000),
        (400, b"\xff\xfe"),
        (400, b'[{"errcode": "M_X"}]'),
    ],
)
def test_answer_that_is_no_matrix_error_is_a_bad_gateway(status: int, body: Any) -> None:
    error = answers.error(answer(status, body, content_type="text/html; charset=utf-8"))
    assert isinstance(error, BadGateway)
    assert error.errcode.startswith("M_")
    assert str(status) in error.error
    assert "text/html" in error.error
    assert "errcode" not in error.extra


# 429


def test_429_passes_status_field_and_header() -> None:
    error = limited({"retry_after_ms": 1_500})
    assert error.status == 429
    assert error.body() == {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many", "retry_after_ms": 1_500}
    assert error.headers() == {"Retry-After": "2"}


@pytest.mark.parametrize(
    ("field", "header", "pause"),
    [
        (2_000, None, 2_000),
        (None, "3", 3_000),
        (2_000, "3", 3_000),
        (5_000, "3", 5_000),
        (600_001, None, 600_000),
        (10**400, None, 600_000),
        (None, "99999999999999999999", 600_000),
        (None, "Fri, 31 Dec 2099 23:59:59 GMT", 600_000),
    ],
)
def test_429_waits_for_the_longer_of_field_and_header_up_to_10_minutes(field: Any, header: Any, pause: int) -> None:
    error = limited({} if field is None else {"retry_after_ms": field}, **({"retry_after": header} if header else {}))
    assert error.extra["retry_after_ms"] == pause
    assert error.headers() == {"Retry-After": str(-(-pause // 1_000))}


def test_429_with_a_date_waits_until_then() -> None:
    pause = limited(retry_after=formatdate(time.time() + 60, usegmt=True)).extra["retry_after_ms"]
    assert 57_000 < pause <= 60_000


@pytest.mark.parametrize(
    "field", [None, 0, -1, True, "1000", 1.5, [], {}, -(10**400)], ids=lambda field: str(field)[:9]
)
@pytest.mark.parametrize(
    "header", [None, "0", "-5", "soon", "", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "²", "Wed, 99 Xyz 99999"]
)
def test_429_that_names_no_usable_time_waits_a_little(field: Any, header: Any) -> None:
    error = limited({"retry_after_ms": field}, **({"retry_after": header} if header is not None else {}))
    assert error.extra["retry_after_ms"] == answers.MIN_PAUSE_MS
    assert error.headers() == {"Retry-After": "1"}


@pytest.mark.parametrize(
    "body", [b"", HTML, b"[1]", b'{"error": "slow down"}', b'{"errcode": 5}', b'{"errcode": null}']
)
def test_429_of_a_proxy_is_a_matrix_rate_limit(body: bytes) -> None:
    error = answers.error(answer(429, body, retry_after="7"))
    assert (error.status, error.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert error.error
    assert error.extra["retry_after_ms"] == 7_000


@settings(max_examples=200, deadline=None)
@given(
    st.integers(100, 599),
    st.binary(max_size=40)
    | st.dictionaries(
        st.sampled_from(["errcode", "error", "retry_after_ms"]), st.sampled_from(["M_X", 5, None, True, 1e99])
    ).map(lambda value: json.dumps(value).encode()),
    st.text(st.characters(max_codepoint=127), max_size=30),
)
def test_arbitrary_answer_is_an_event_id_or_an_error(status: int, body: bytes, header: str) -> None:
    found = answer(status, body, retry_after=header)
    try:
        assert answers.event_id(found)
    except MatrixError as caught:
        error = caught
    else:
        return
    assert 400 <= error.status < 600
    assert isinstance(error.body()["errcode"], str)
    assert isinstance(error.body()["error"], str)
    assert all(value.isdigit() for value in error.headers().values())


# no answer


@pytest.mark.parametrize(
    ("failure", "kind", "status"),
    [
        (TimedOut("no answer within 10 s", sent=True), GatewayTimeout, 504),
        (TimedOut("all connections are taken", sent=False), GatewayTimeout, 504),
        (Unreachable("refused", sent=False), BadGateway, 502),
        (NoAnswer("too long", sent=True), BadGateway, 502),
    ],
)
def test_no_answer_is_a_gateway_error_that_says_why(failure: NoAnswer, kind: type[MatrixError], status: int) -> None:
    error = answers.no_answer(failure)
    assert isinstance(error, kind)
    assert (error.status, error.error) == (status, str(failure))


# what becomes of an event


@pytest.mark.parametrize(
    ("kind", "status", "body"),
    [
        ("sent", 200, {"event_id": "$x"}),
        ("again", 200, {}),
        ("again", 200, HTML),
        ("again", 201, {"event_id": "$x"}),
        ("again", 204, b""),
        ("again", 302, b""),
        ("again", 302, {"errcode": "M_FORBIDDEN", "error": "moved"}),
        ("again", 400, HTML),
        ("again", 401, b""),
        ("again", 403, HTML),
        ("again", 403, {"error": "no errcode"}),
        ("again", 404, b"404 page not found"),
        ("again", 404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}),
        ("again", 405, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}),
        ("again", 413, HTML),
        ("again", 500, {"errcode": "M_UNKNOWN", "error": "Internal server error"}),
        ("again", 500, {"errcode": "M_FORBIDDEN", "error": "?"}),
        ("again", 502, HTML),
        ("again", 503, {"errcode": "M_UNKNOWN", "error": "busy"}),
        ("again", 599, {"errcode": "M_TOO_LARGE", "error": "?"}),
        ("slow", 429, {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many"}),
        ("slow", 429, HTML),
        ("token", 401, {"errcode": "M_UNKNOWN_TOKEN", "error": "Invalid"}),
        ("token", 401, {"errcode": "M_MISSING_TOKEN", "error": "Missing"}),
        ("token", 401, {"errcode": "M_USER_LOCKED", "error": "Locked", "soft_logout": True}),
        ("account", 401, {"errcode": "M_FORBIDDEN", "error": "?"}),
        ("account", 401, {"errcode": "M_UNAUTHORIZED", "error": "?"}),
        ("account", 403, {"errcode": "M_RESOURCE_LIMIT_EXCEEDED", "error": "Too many users"}),
        ("account", 403, {"errcode": "M_USER_SUSPENDED", "error": "Suspended"}),
        ("account", 403, {"errcode": "M_CONSENT_NOT_GIVEN", "error": "Agree first", "consent_uri": "https://x"}),
        ("account", 403, {"errcode": "M_USER_DEACTIVATED", "error": "Gone"}),
        ("account", 403, {"errcode": "M_USER_LOCKED", "error": "Locked"}),
        ("account", 403, {"errcode": "ORG_MATRIX_EXPIRED_ACCOUNT", "error": "Expired"}),
        ("account", 408, {"errcode": "M_UNKNOWN", "error": "too slow"}),
        ("account", 409, {"errcode": "M_UNKNOWN", "error": "in conflict"}),
        ("account", 425, {"errcode": "M_UNKNOWN", "error": "too early"}),
        ("again", 408, HTML),
        ("again", 409, b""),
        ("slow", 403, {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many"}),
        ("dead", 403, {"errcode": "M_UNKNOWN", "error": "?"}),
        ("dead", 403, {"errcode": "M_CANNOT_LEAVE_SERVER_NOTICE_ROOM", "error": "No."}),
        ("forbidden", 403, {"errcode": "M_FORBIDDEN", "error": "You are not in the room"}),
        ("dead", 403, {"errcode": "M_GUEST_ACCESS_FORBIDDEN", "error": "No guests"}),
        ("account", 403, {"errcode": "M_UNKNOWN_TOKEN", "error": "?"}),
        ("dead", 400, {"errcode": "M_BAD_JSON", "error": "No."}),
        ("dead", 400, {"errcode": "M_NOT_JSON", "error": "No."}),
        ("dead", 400, {"errcode": "M_INVALID_PARAM", "error": "No."}),
        ("dead", 400, {"errcode": "ORG_EXAMPLE", "error": "No."}),
        ("dead", 404, {"errcode": "M_NOT_FOUND", "error": "Unknown room"}),
        ("dead", 413, {"errcode": "M_TOO_LARGE", "error": "event too large"}),
    ],
)
def test_verdict_over_an_answer(kind: str, status: int, body: Any) -> None:
    found = answers.judge(answer(status, body))
    assert found.kind == kind
    if kind == "sent":
        assert (found.event_id, found.error) == ("$x", None)
    else:
        assert found.event_id == ""
        assert found.error is not None
        assert found.error.error


@pytest.mark.parametrize(("body", "pause"), [({"retry_after_ms": 1_500}, 1_500), ({}, 500), (HTML, 500), (b"", 500)])
def test_verdict_over_a_429_says_how_long_to_pause(body: Any, pause: int) -> None:
    assert answers.judge(answer(429, body)).pause_ms == pause
    assert answers.judge(answer(429, body, retry_after="7")).pause_ms == 7_000


@pytest.mark.parametrize(
    ("body", "headers", "pause"),
    [
        ({}, {}, 0),
        ({}, {"retry_after": "7"}, 7_000),
        ({"retry_after_ms": 1_500}, {}, 1_500),
        ({"retry_after_ms": "soon"}, {"retry_after": "-1"}, 0),
        ({"retry_after_ms": 10**9}, {}, 600_000),
        ({}, {"retry_after": "999999"}, 600_000),
    ],
)
def test_refusal_of_an_account_says_how_long_to_pause_if_the_homeserver_does(
    body: dict[str, Any], headers: dict[str, str], pause: int
) -> None:
    found = answers.judge(answer(403, {"errcode": "M_USER_SUSPENDED", "error": "No.", **body}, **headers))
    assert (found.kind, max(0, found.pause_ms)) == ("account", pause)


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("kind", [TimedOut, Unreachable, NoAnswer])
def test_event_is_tried_again_when_there_is_no_answer(kind: type[NoAnswer], *, sent: bool) -> None:
    found = answers.refused(answers.no_answer(kind("nothing", sent=sent)))
    assert found.kind == "again"
    assert found.error is not None
    assert found.error.sent is sent


@settings(max_examples=200, deadline=None)
@given(
    st.integers(100, 999),
    st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(["errcode", "error"]), st.sampled_from([5, None, True, ["M_FORBIDDEN"]])).map(
        lambda value: json.dumps(value).encode()
    ),
)
def test_nothing_but_an_errcode_kills_an_event(status: int, body: bytes) -> None:
    assert answers.judge(answer(status, body)).kind in ("again", "slow")
