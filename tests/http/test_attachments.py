"""Files of messages: from a URL, from the message, from a form (contract §5), and what hostile ones get."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from flowbridge.models import ApiKey
from flowbridge.models.timing import Timing
from tests import upstream as scripted
from tests.http.conftest import ROOM, Bridge, as_caller, post, running
from tests.http.sends import KEYED, is_replayed
from tests.http.test_messages import scoped
from tests.patience import PATIENCE
from tests.upstream import Behaviour, Request, Rooms, Upstream

MESSAGES = f"/rooms/{ROOM}/messages"
PAGE = b"<!doctype html><p>Please log in"


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "PNG")
    return file.getvalue()


def file(body: bytes, kind: str = "image/png", *headers: str) -> Behaviour:
    """An answer with this file."""
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers, "", ""]
    return scripted.raw("\r\n".join(lines).encode() + body)


class Files(Rooms):
    """A homeserver that keeps files, too: `uploads` are their names, types and bytes. `refusal`: of uploads."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[tuple[str | None, str, bytes]] = []
        self.refusal: Behaviour | None = None
        self.most = 1_000_000

    def __call__(self, request: Request) -> Behaviour | None:
        if request.path.endswith("/config"):
            return scripted.answer({"m.upload.size": self.most})
        if not request.path.endswith("/upload"):
            return super().__call__(request)
        if self.refusal is not None:
            return self.refusal
        self.uploads.append((request.query("filename"), request.header("content-type"), request.body))
        return scripted.answer({"content_uri": f"mxc://upstream/{len(self.uploads)}"})


@pytest.fixture
def files(upstream: Upstream) -> Files:
    found = Files()
    upstream.script(found)
    return found


@pytest.fixture(scope="module")
def fetching(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """A bridge that may fetch from 127.0.0.1, and is quick to give up."""
    folder, timing = tmp_path_factory.mktemp("fetching"), Timing(fetch_silence_seconds=1.0, fetch_seconds=3.0)
    with running(shared_upstream, folder, fetch_allow=("127.0.0.1",), timing=timing) as bridge:
        yield bridge


@pytest.fixture
def caller(fetching: Bridge) -> Iterator[httpx.Client]:
    with as_caller(fetching) as client:
        yield client


@pytest.fixture
def web() -> Iterator[Upstream]:
    """A web server with a picture."""
    with Upstream(lambda _: file(png())) as found:
        yield found


def attached(*attachments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**more, "attachments": attachments}


def problem(answer: httpx.Response, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    (found,) = answer.json()["flowbridge"]["problems"]
    return found["pointer"], found["message"]


def as_form(data: bytes, name: str) -> dict[str, Any]:
    return {"files": {"file": (name, data, "image/png")}}


@pytest.mark.parametrize(
    "body",
    [
        {"content": png(), "headers": {"Content-Type": "image/png"}},
        {"content": iter([png()]), "headers": {"Content-Type": "image/png"}},
        as_form(png(), "cat.png"),
        {"json": {"data": base64.b64encode(png()).decode(), "content_type": "image/png"}},
        {"content": png() + bytes(2_000_000 - len(png())), "headers": {"Content-Type": "image/png"}},
    ],
    ids=["raw", "of unknown length", "form", "base64", "large"],
)
def test_upload_answers_what_an_event_says_of_the_file(
    caller: httpx.Client, files: Files, body: dict[str, Any]
) -> None:
    files.most = 3_000_000
    answer = caller.post("/media", params={"filename": "cat.png"}, **body)
    assert answer.status_code == 200, answer.text
    size = len(files.uploads[0][2])
    assert size in (len(png()), 2_000_000)
    uploaded = {"content_uri": "mxc://upstream/1", "info": {"mimetype": "image/png", "size": size, "w": 40, "h": 30}}
    assert answer.json() == uploaded
    sent = caller.post(MESSAGES, json=attached({**uploaded, "filename": "cat.png"}))
    assert sent.status_code == 200, sent.text
    (picture,) = (event.content for event in files.events)
    assert (picture["msgtype"], picture["info"]) == ("m.image", uploaded["info"])


def test_upload_of_what_is_no_picture_has_no_width(caller: httpx.Client, files: Files) -> None:
    for kind, data in (
        ("image/png", b"\x89PNG\r\n\x1a\n"),
        ("text/plain; charset=utf-8", b"hello"),
        ("image/gif", b"GIF89a"),
    ):
        answer = caller.post("/media", content=data, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
        assert answer.json()["info"] == {"mimetype": kind.split(";")[0], "size": len(data)}


def test_picture_of_a_url_is_shown_as_one(caller: httpx.Client, files: Files, web: Upstream) -> None:
    answer = caller.post(MESSAGES, json=attached({"url": f"{web.url}/yard/cat.png", "caption": "The cat"}, text="See"))
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["events"]) == 2
    assert files.uploads == [("cat.png", "image/png", png())]
    text, picture = (event.content for event in files.events)
    assert text["body"] == "See"
    assert picture == {
        "msgtype": "m.image",
        "body": "The cat",
        "filename": "cat.png",
        "url": "mxc://upstream/1",
        "info": {"mimetype": "image/png", "size": len(png()), "w": 40, "h": 30},
        "m.mentions": {},
    }
    assert web.requests[0].header("authorization") == ""


@pytest.mark.parametrize(
    "data",
    [base64.b64encode(png()).decode(), {"type": "Buffer", "data": list(png())}],
    ids=["base64", "buffer"],
)
def test_file_in_a_message_is_sent(caller: httpx.Client, files: Files, data: Any) -> None:
    answer = caller.post(MESSAGES, json=attached({"data": data, "filename": "cat.png"}))
    assert answer.status_code == 200, answer.text
    assert files.uploads == [("cat.png", "image/png", png())]
    assert files.events[0].content["info"]["w"] == 40


def test_message_with_a_file_of_some_megabytes_inside_is_taken(caller: httpx.Client, files: Files) -> None:
    data = b"x" * 900_000
    answer = caller.post(MESSAGES, json=attached({"data": base64.b64encode(data).decode(), "filename": "log.txt"}))
    assert answer.status_code == 200, answer.text
    assert files.uploads[0][2] == data


def test_large_body_needs_a_token_that_the_homeserver_knows(bridge: Bridge, upstream: Upstream) -> None:
    upstream.script(
        lambda request: scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "no") if request.path.endswith("whoami") else None
    )
    body = json.dumps(attached({"data": "A" * 600_000})).encode()
    answer = bridge.ask(post(MESSAGES, body, "Content-Type: application/json"))
    assert answer.status == 401


def test_form_with_files_is_one_message(caller: httpx.Client, files: Files) -> None:
    given = [("file", ("cat.png", png(), "image/png")), ("file", ("b.txt", b"b", "text/plain"))]
    answer = caller.post(MESSAGES, data={"markdown": "**See**", "key": "yard"}, files=given)
    assert answer.status_code == 200, answer.text
    assert [(name, kind) for name, kind, _ in files.uploads] == [("cat.png", "image/png"), ("b.txt", "text/plain")]
    assert [event.content["msgtype"] for event in files.events] == ["m.text", "m.image", "m.file"]
    assert files.events[0].content["formatted_body"] == "<strong>See</strong>"


def test_same_form_under_the_same_key_is_uploaded_once(caller: httpx.Client, files: Files) -> None:
    given = {"file": ("cat.png", png(), "image/png")}
    first = caller.post(MESSAGES, files=given, headers=KEYED)
    again = caller.post(MESSAGES, files=given, headers=KEYED)
    assert is_replayed(again)
    assert again.json() == first.json()
    assert len(files.uploads) == len(files.events) == 1
    other = caller.post(MESSAGES, files={"file": ("cat.png", png((1, 1)), "image/png")}, headers=KEYED)
    assert other.status_code == 422


def test_repeat_under_a_key_fetches_nothing(caller: httpx.Client, files: Files, web: Upstream) -> None:
    body = attached({"url": f"{web.url}/a.png"}, {"url": f"{web.url}/b.png"}, text="See")
    answers = [caller.post(MESSAGES, json=body, headers=KEYED) for _ in range(3)]
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert len(answers[0].json()["events"]) == 3
    assert len(web.requests) == 2


def test_relations_stay_with_files(caller: httpx.Client, files: Files, web: Upstream) -> None:
    caller.post(MESSAGES, json=attached({"url": f"{web.url}/a.png"}, thread="$root", reply_to="$other"))
    relation = files.events[0].content["m.relates_to"]
    assert (relation["event_id"], relation["m.in_reply_to"]["event_id"]) == ("$root", "$other")


# what is refused


LONG = {"text": "line\n" * 20_000, "overflow": "file"}


@pytest.mark.parametrize(
    ("more", "status"),
    [({"reply_to": "no-delivery-of-mine"}, 404), ({"title": "T", "reply_to": "nothing at all"}, 400)],
)
def test_long_text_that_is_refused_uploads_no_file(
    caller: httpx.Client, files: Files, more: dict[str, Any], status: int
) -> None:
    assert caller.post(MESSAGES, json={**LONG, **more}).status_code == status
    assert (files.uploads, files.events) == ([], [])


def test_long_text_is_uploaded_once_under_a_key(caller: httpx.Client, files: Files) -> None:
    first, second = (caller.post(MESSAGES, json=LONG, headers={"Idempotency-Key": "long"}) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["events"] == second.json()["events"]
    assert files.uploads == [("message.txt", "text/plain; charset=utf-8", LONG["text"].encode())]


def test_file_of_a_long_text_comes_before_those_beside_it(caller: httpx.Client, files: Files) -> None:
    picture = {"data": base64.b64encode(png()).decode(), "filename": "cat.png"}
    answer = caller.post(MESSAGES, json=attached(picture, **LONG))
    assert len(answer.json()["events"]) == 3
    assert [name for name, _, _ in files.uploads] == ["message.txt", "cat.png"]
    assert [event.content["msgtype"] for event in files.events] == ["m.text", "m.file", "m.image"]
    broken = caller.post(MESSAGES, json=attached(picture, {"data": "?"}, **LONG))
    assert problem(broken)[0] == "/attachments/1/data"


def test_text_that_is_refused_uploads_nothing(caller: httpx.Client, files: Files, web: Upstream) -> None:
    answer = caller.post(MESSAGES, json=attached({"url": f"{web.url}/a.png"}, text="x" * 70_000))
    assert answer.status_code == 413
    answer = caller.post(MESSAGES, json=attached({"url": f"{web.url}/a.png"}, text="x", reply_to="nothing-there"))
    assert answer.status_code == 404
    assert (web.requests, files.uploads, files.events) == ([], [], [])


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (file(PAGE), "is not image/png but a web page, perhaps a login or an error"),
        (file(b""), "is empty"),
        (scripted.answer({}, 404), "answers 404"),
        (
            scripted.redirect("http://169.254.169.254/latest/meta-data"),
            "leads to an address that is not on the internet",
        ),
        (scripted.redirect("/again"), "redirects more than 3 times"),
        (scripted.silence, "did not arrive in time"),
        (scripted.hang_up, "broke off"),
        (scripted.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + b"x" * 90, 60.0), "did not arrive in time"),
        (scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"), "did not arrive in time"),
    ],
)
def test_server_that_gives_no_such_file_is_a_problem_at_the_url(
    caller: httpx.Client, files: Files, behaviour: Behaviour, reason: str
) -> None:
    with Upstream(lambda _: behaviour) as hostile:
        answer = caller.post(MESSAGES, json=attached({"url": f"{hostile.url}/a.png"}, text="See"), timeout=PATIENCE)
    pointer, message = problem(answer)
    assert pointer == "/attachments/0/url"
    assert reason in message
    assert files.events == []


def test_file_that_is_too_large_is_a_413(caller: httpx.Client, files: Files) -> None:
    with Upstream(lambda _: scripted.chunked(b"x" * 65_536 for _ in range(1_000))) as endless:
        answer = caller.post(MESSAGES, json=attached({"url": f"{endless.url}/a.bin"}))
    assert problem(answer, 413) == (
        "/attachments/0/url",
        "is larger than 1000000 bytes, which is the most that may be uploaded",
    )
    answer = caller.post(MESSAGES, files={"file": ("a.bin", b"x" * 1_000_001)})
    assert answer.status_code == 413
    assert files.events == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://127.1:1/",
        "http://2130706433:1/",
        "http://0x7f.1:1/",
        "http://[::1]:1/",
        "http://[::ffff:127.0.0.1]:1/",
        "http://localhost:1/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://0/",
    ],
)
def test_private_address_is_refused_in_every_spelling(shared_bridge: Bridge, files: Files, url: str) -> None:
    with as_caller(shared_bridge) as caller:
        pointer, message = problem(caller.post(MESSAGES, json=attached({"url": url})))
    assert pointer == "/attachments/0/url"
    assert message == "leads to an address that is not on the internet; FLOWBRIDGE_FETCH_ALLOW permits such ones"


@pytest.mark.parametrize(
    ("attachment", "pointer", "message"),
    [
        ({"url": "ftp://example.org/a"}, "", "is no address of a file on the web: https://… or http://…"),
        ({"url": "https://user:pw@example.org/"}, "", "holds a user name or password: it would be stored and shown"),
        ({"data": "not base64!"}, "", "is not base64"),
        ({"data": 7}, "", "must be base64, a data: URL, or a Node-RED Buffer"),
        ({"data": {"type": "Buffer", "data": [256]}}, "/data/0", "must be an integer from 0 to 255"),
        ({"data": base64.b64encode(PAGE).decode(), "mimetype": "image/png"}, "", "is not image/png but a web page"),
    ],
)
def test_file_that_is_none_is_a_problem_at_its_pointer(
    caller: httpx.Client, files: Files, attachment: dict[str, Any], pointer: str, message: str
) -> None:
    at, found = problem(caller.post(MESSAGES, json=attached(attachment, text="See")))
    assert at == f"/attachments/0/{next(iter(attachment))}{pointer}"
    assert found.startswith(message)
    assert (files.uploads, files.events) == ([], [])


def test_homeserver_that_takes_no_file_keeps_nothing_of_the_message(caller: httpx.Client, files: Files) -> None:
    files.refusal = scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "slowly", retry_after_ms=1_500)
    answer = caller.post(MESSAGES, json=attached({"data": "AAAA"}, text="See"))
    assert (answer.status_code, answer.json()["errcode"]) == (429, "M_LIMIT_EXCEEDED")
    assert files.events == []


def test_key_without_the_room_fetches_nothing(
    shared_upstream: Upstream, tmp_path: Path, files: Files, web: Upstream
) -> None:
    """The right is checked first: a key for one room is no way to have URLs fetched."""

    with scoped(shared_upstream, tmp_path, other=ApiKey("k", rooms=("!elsewhere:upstream",))) as bridge:
        answer = httpx.post(
            bridge.url + MESSAGES,
            json=attached({"url": f"{web.url}/a.png"}),
            headers={"X-API-Key": "fb_other"},
            trust_env=False,
        )
    assert answer.status_code == 403
    assert web.requests == []


def test_delivery_log_keeps_no_file(caller: httpx.Client, files: Files) -> None:
    data = base64.b64encode(hashlib.sha512(b"x").digest() * 2_000).decode()
    answer = caller.post(MESSAGES, json=attached({"data": data, "filename": "x.bin"}))
    log = caller.get(f"/deliveries/{answer.json()['delivery_id']}")
    assert log.status_code == 200
    assert data[:100] not in log.text
