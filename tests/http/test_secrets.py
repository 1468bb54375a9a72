"""The canary: tokens are in no log and in no answer, and go upstream in one header and nowhere else."""

import io
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from flowbridge.web.server import background
from tests import upstream as scripted
from tests.http.conftest import HASTE_SECONDS, HELLO, ROOM, SEND, STILL, Bridge, post, settings_for
from tests.upstream import PATIENCE, Upstream

HEADER = "canary_in_the_header"
QUERY = "canary_in_the_query"
BOT = "canary_of_the_bot"
KEY = "fb_canary_of_a_key-of-32-characters-and-some-more"
OTHER_KEY = "fb_canary_of_an_unknown_key-of-32-characters-and-some-more"
PASSWORD = "canary_of_the_password"
CANARY = "canary_"
CALLERS = 32

BODY = json.dumps(HELLO).encode()
MATRIX = "/_matrix/client/v3"


def requests() -> Iterator[bytes]:
    """Tokens in every place, right and wrong."""
    credentials = [
        ("", [f"Authorization: Bearer {HEADER}"]),
        (f"?access_token={QUERY}", ["Authorization: Basic x"]),
        (f"?x=1&access_token={QUERY}&y=2", ["Authorization: Basic x"]),
        (f"?access_token={QUERY}", [f"Authorization: Bearer {HEADER}"]),
        (f"?access_token={QUERY}%00", ["Authorization: Basic x"]),
        (f"?access_token={QUERY}&access_token={QUERY}", ["Authorization: Basic x"]),
        (f"?ACCESS_TOKEN={QUERY}", ["Authorization: Basic x"]),
        ("", ["Authorization: Basic x", f"X-API-Key: {KEY}"]),
        ("", [f"Authorization: Bearer {KEY}"]),
        (f"?access_token={KEY}", ["Authorization: Basic x"]),
        ("", ["Authorization: Basic x", f"X-API-Key: {OTHER_KEY}"]),
        ("", [f"Authorization: Bearer {OTHER_KEY}"]),
        ("", [f"Authorization: Bearer {HEADER}\xff"]),
        ("", [f"Authorization: {HEADER}"]),
        ("", ["Authorization: Basic x", f"Cookie: access_token={HEADER}", f"Referer: /?access_token={QUERY}"]),
    ]
    for query, headers in credentials:
        for prefix in ("", MATRIX):
            yield post(f"{prefix}{SEND}/1{query}", BODY, *headers, method="PUT")
            yield post(f"{prefix}/rooms/%23alias:upstream/send/m.room.message{query}", BODY, *headers)
            yield post(f"{prefix}/rooms/{ROOM}/state/m.room.name{query}", b"", *headers, method="GET")
            yield post(f"{prefix}{SEND}{query}", b"{", *headers)
            yield post(f"{prefix}{SEND}{query}", BODY, *headers, method="DELETE")
            yield post(f"{prefix}/rooms/{ROOM}/send/..{query}", BODY, *headers)
        for path in ("/nothing", "//", "/rooms%2Fx", "/healthz", "/readyz", f"{MATRIX}/versions", "/docs", "/"):
            yield post(path + query, b"", *headers, method="GET")
        yield post(f"/validate/m.room.message{query}", b"{}", *headers)
    yield f"GET /healthz?access_token={QUERY} HTTP/1.1\r\nAuthorization: Bearer {HEADER}\r\nno colon\r\n\r\n".encode()
    yield f"GET /healthz?access_token={QUERY} HTTP/9.9\r\nAuthorization: Bearer {HEADER}\r\n\r\n".encode()
    yield f"GET http://bridge?access_token={QUERY} HTTP/1.1\r\nAuthorization: Bearer {HEADER}\r\n\r\n".encode()
    yield f"GET /ä?access_token={QUERY} HTTP/1.1\r\nAuthorization: Bearer {HEADER}\r\n\r\n".encode()
    yield post(f"{SEND}?access_token={QUERY}", BODY, "Content-Encoding: gzip")
    yield post(f"/healthz?access_token={QUERY}", b"", "Connection: Upgrade", "Upgrade: websocket", method="GET")


BEHAVIOURS: dict[str, scripted.Behaviour | None] = {
    "well": None,
    "html": scripted.html(502),
    "html-200": scripted.html(200),
    "hangs-up": scripted.hang_up,
    "garbage": scripted.raw(b"\0\0\0\0"),
    "401": scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Unrecognised access token"),
    "500": scripted.matrix_error(500, "M_UNKNOWN", "Internal server error"),
    "status-999": scripted.answer({"errcode": "M_UNKNOWN", "error": "x"}, 999),
}


def play(bridge: Bridge, *names: str) -> bytes:
    """Every request, to a homeserver in each of these states; all that the bridge says.

    Many at once: who sends while the homeserver is not well waits as long as the bridge does.
    """
    said = b""
    for number, name in enumerate(names):
        behaviour = BEHAVIOURS[name]
        for at in ("/whoami", "/rooms/") if behaviour else ("",):
            bridge.upstream.script(None)
            if behaviour:
                bridge.upstream.always(behaviour, at=at)
            # other tokens in each round, so that none is remembered from the one before
            marked = [
                request.replace(HEADER.encode(), f"{HEADER}_{number}{at[1:2]}".encode()) for request in requests()
            ]
            with ThreadPoolExecutor(CALLERS) as callers:
                said += b"".join(callers.map(partial(tell, bridge), marked))
    return said


def tell(bridge: Bridge, request: bytes) -> bytes:
    with bridge.connect() as client:
        client.send(request.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nConnection: close\r\n", 1)).end()
        return client.rest(PATIENCE) or b""


def check_upstream(upstream: Upstream) -> None:
    seen = upstream.requests
    assert seen
    for request in seen:
        assert CANARY not in request.target
        assert "access_token" not in request.target
        assert CANARY.encode() not in request.body
        assert [name for name, value in request.headers if CANARY in value] in ([], ["authorization"])
    tokens = {request.header("authorization") for request in seen}
    assert any(token.startswith(f"Bearer {HEADER}") for token in tokens)
    assert f"Bearer {QUERY}" in tokens
    assert f"Bearer {BOT}" in tokens
    assert not any("fb_" in token for token in tokens)


def check_store(folder: Path) -> None:
    """The tokens are in it, though nobody could read them there."""
    with sqlite3.connect(folder / "flowbridge.db") as connection:
        assert connection.execute("SELECT count(*) FROM tokens WHERE token LIKE 'gAAAA%'").fetchone()[0] > 3
        assert connection.execute("SELECT count(*) FROM outbox").fetchone()[0] > 10
    connection.close()
    for file in folder.glob("flowbridge.db*"):
        assert CANARY.encode() not in file.read_bytes(), file


def secret_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if CANARY in line]


@contextmanager
def everything_logged() -> Iterator[io.StringIO]:
    """All that any logger of the process says, at every level, with its arguments and fields."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    layout = "%(name)s %(levelname)s %(message)s %(args)s %(fields)s"
    handler.setFormatter(logging.Formatter(layout, defaults={"fields": ""}))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield text
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


def test_no_logger_of_the_process_says_a_token(tmp_path: Path) -> None:
    with Upstream() as upstream, everything_logged() as text:
        settings = settings_for(
            upstream.url,
            tmp_path,
            access_token=SecretStr(BOT),
            api_keys=(SecretStr(KEY),),
            wait_seconds=HASTE_SECONDS,
        )
        with background(settings, timing=STILL) as url:
            said = play(Bridge(url, upstream), *BEHAVIOURS)
        check_upstream(upstream)
    check_store(tmp_path)
    assert secret_lines(text.getvalue()) == []
    assert secret_lines(said.decode("latin-1")) == []
    assert text.getvalue().count("/nothing") > 10, "the log does say which paths were asked for"
    assert {"not_delivered", "account_paused", "request"} <= set(
        re.findall(r"^flowbridge \w+ (\w+)", text.getvalue(), re.MULTILINE)
    )


@pytest.mark.parametrize(("level", "style"), [("debug", "text"), ("info", "json")])
def test_serve_prints_no_token(tmp_path: Path, level: str, style: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FLOWBRIDGE_", "ACCESS_", "BASE_"))
    }
    with Upstream() as upstream, (tmp_path / "stderr").open("wb") as stderr:
        environment |= {
            "BASE_URL": upstream.url,
            "ACCESS_TOKEN": BOT,
            "FLOWBRIDGE_API_KEYS": KEY,
            "FLOWBRIDGE_WAIT_SECONDS": str(HASTE_SECONDS),
            "FLOWBRIDGE_LOG_FORMAT": style,
            "FLOWBRIDGE_LOG_LEVEL": level,
            "PYTHONASYNCIODEBUG": "1" if level == "debug" else "",
        }
        command = [sys.executable, "-m", "flowbridge", "serve", "--port", "0"]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=stderr) as process:
            try:
                url = wait_for_url(tmp_path / "stderr")
                said = play(Bridge(url, upstream), "well", "html")
            finally:
                process.terminate()
            printed, _ = process.communicate(timeout=PATIENCE)
        check_upstream(upstream)
    check_store(tmp_path)
    logged = (tmp_path / "stderr").read_text()
    assert secret_lines(logged) == []
    assert secret_lines(printed.decode()) == []
    assert secret_lines(said.decode("latin-1")) == []
    assert "/nothing" in logged
    if style == "json":
        assert all(isinstance(json.loads(line), dict) for line in logged.splitlines())


def wait_for_url(log_file: Path) -> str:
    """The address that `serve` says it listens on."""
    ending = time.monotonic() + PATIENCE
    pause = threading.Event()
    while time.monotonic() < ending:
        if found := re.search(r'serving.*?url[=": ]+(http://[0-9.:]+)', log_file.read_text()):
            return found[1]
        pause.wait(0.02)
    raise AssertionError(f"serve did not start: {log_file.read_text()}")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"ACCESS_TOKEN": f"{BOT} with a space"}, id="token"),
        pytest.param({"FLOWBRIDGE_API_KEYS": "canary_without_its_prefix"}, id="key"),
        pytest.param({"ACCESS_TOKEN": BOT, "FLOWBRIDGE_USER": "bot", "FLOWBRIDGE_PASSWORD": PASSWORD}, id="both"),
        pytest.param({"FLOWBRIDGE_PASSWORD": PASSWORD}, id="password-alone"),
        pytest.param({"BASE_URL": f"https://bot:{PASSWORD}@hs.example"}, id="password-in-the-address"),
    ],
)
def test_settings_that_are_refused_are_not_repeated(tmp_path: Path, values: dict[str, str]) -> None:
    environment = {"PATH": os.environ["PATH"], **values}
    command = [sys.executable, "-m", "flowbridge", "serve", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert secret_lines(done.stderr + done.stdout) == []


def test_password_goes_to_login_alone_and_into_no_log(tmp_path: Path) -> None:
    with Upstream() as upstream, everything_logged() as text:
        upstream.script(
            lambda request: scripted.answer({"access_token": BOT}) if request.target.endswith("/login") else None
        )
        settings = settings_for(
            upstream.url,
            tmp_path,
            access_token=None,
            user="bot",
            password=SecretStr(PASSWORD),
            api_keys=(SecretStr(KEY),),
        )
        with background(settings, timing=STILL) as url:
            assert Bridge(url, upstream).post(SEND, BODY, f"X-API-Key: {KEY}").status == 200
        seen = [request for request in upstream.requests if PASSWORD.encode() in request.body]
        assert [request.target for request in seen] == [f"{MATRIX}/login"]
        assert all(PASSWORD not in quote(value) for request in upstream.requests for _, value in request.headers)
    assert not any(PASSWORD.encode() in file.read_bytes() for file in tmp_path.glob("flowbridge.db*"))
    assert secret_lines(text.getvalue()) == []
