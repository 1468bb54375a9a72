"""`flowbridge hooks`, run as a user runs it: alone, beside a running bridge, and what senders then get."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet

from flowbridge.store import Database
from flowbridge.store import hooks as store
from tests.patience import PATIENCE, until
from tests.processes import run, serving
from tests.upstream import Rooms, Upstream

ROOM = "!room:upstream"
CANARY = "canary-of-31-visible-characters"
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def upstream(rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    monkeypatch.chdir(tmp_path)  # the store is made there
    assert run("init").returncode == 0
    with Upstream(rooms) as server:
        (tmp_path / ".env").write_text(f"BASE_URL={server.url}\nACCESS_TOKEN=bot\n")
        yield server


def hooks(*arguments: str, stdin: str = "", **settings: str) -> Done:
    return run("hooks", *arguments, stdin=stdin, **settings)


def listed() -> list[Any]:
    done = hooks("list", "--json")
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)["hooks"]
    return found


def create(*arguments: str, **settings: str) -> tuple[str, str]:
    """URL and line to try it."""
    done = hooks("create", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    url, line = done.stdout.splitlines()
    return url, line


def tell(url: str, body: object) -> httpx.Response:
    return httpx.post(url, json=body, trust_env=False, timeout=PATIENCE)


@pytest.mark.usefixtures("upstream")
def test_create_prints_the_bare_url_and_a_line_to_try_it() -> None:
    done = hooks("create", "ci", "--room", ROOM, FLOWBRIDGE_PUBLIC_URL="https://hooks.example.org")
    assert done.returncode == 0, done.stderr
    url, line = done.stdout.splitlines()
    base, token = url.rsplit("/", 1)
    assert base == "https://hooks.example.org/hooks/ci"
    assert token.startswith("fh_")
    assert line == f"curl -H 'Content-Type: application/json' -d '{{\"text\": \"A test of the hook ci\"}}' {url}"
    assert "The hook ci is made: what its sender posts appears in !room:upstream." in done.stderr
    assert token not in done.stderr
    (hook,) = listed()
    assert (hook["name"], hook["room"], hook["fixed"]) == ("ci", ROOM, False)
    for shown in (hooks("list"), hooks("show", "ci"), hooks("show", "ci", "--json")):
        assert shown.returncode == 0
        assert token not in shown.stdout + shown.stderr
        assert "ci" in shown.stdout


@pytest.mark.usefixtures("upstream")
def test_address_that_is_assumed_is_said_to_be_so() -> None:
    """`serve --port 9000` is nothing that another command hears of."""
    done = hooks("create", "assumed", "--room", ROOM)
    assert done.stdout.startswith("http://127.0.0.1:8090/hooks/assumed/fh_")
    assert "http://127.0.0.1:8090 is where the bridge is assumed to be" in done.stderr
    assert "FLOWBRIDGE_PUBLIC_URL" in done.stderr
    done = hooks("rotate", "assumed", FLOWBRIDGE_PORT="9000")
    assert done.stdout.startswith("http://127.0.0.1:9000/hooks/assumed/fh_")
    assert "http://127.0.0.1:9000 is where the bridge is assumed to be" in done.stderr
    done = hooks("rotate", "assumed", FLOWBRIDGE_PUBLIC_URL="https://hooks.example.org")
    assert done.stdout.startswith("https://hooks.example.org/hooks/assumed/fh_")
    assert "assumed to be" not in done.stderr


@pytest.mark.usefixtures("upstream")
def test_all_options_are_in_the_definition(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{CANARY}\n")
    (tmp_path / "news.md.j2").write_text("**{{ payload.title }}**\n")
    options = {
        "room": "#ops:upstream",
        "source": "generic",
        "scheme": "hmac",
        "secret-file": str(tmp_path / "secret"),
        "header": "X-Own",
        "prefix": "v1=",
        "encoding": "base64",
        "timestamp-header": "X-Time",
        "template": str(tmp_path / "news.md.j2"),
        "per": "alerts",
        "on-update": "thread",
        "mention": "@alice:hs",
        "mentions": "template",
        "ignore": "push",
        "keep-requests": "3",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    done = hooks("create", "ci", *arguments, "--mention=@room")
    assert done.returncode == 0, done.stderr
    assert f"Its secret is {CANARY}" in done.stderr
    assert done.stdout.splitlines()[0].endswith("/hooks/ci")
    shown = json.loads(hooks("show", "ci", "--json").stdout)
    assert shown["verification"] == {
        "scheme": "hmac",
        "header": "X-Own",
        "prefix": "v1=",
        "encoding": "base64",
        "timestamp_header": "X-Time",
    }
    assert shown["template"] == {"markdown": "**{{ payload.title }}**"}
    assert (shown["per"], shown["on_update"], shown["mentions"]) == ("alerts", "thread", "template")
    assert (shown["mention"], shown["ignore"], shown["keep_requests"]) == (["@alice:hs", "@room"], ["push"], 3)
    assert CANARY not in hooks("show", "ci").stdout


WRONG: list[tuple[list[str], int, str]] = [
    (["create", "CI", "--room", ROOM], 2, "NAME: must be 1 to 64 of a-z"),
    (["create", "ci", "--room", "ops"], 2, "--room: names no room: 'ops' is not a room"),
    (["create", "ci", "--room", ROOM, "--scheme", "md5"], 2, "--scheme: must be token, github"),
    (["create", "ci", "--room", ROOM, "--scheme", "hmac"], 2, "--header: is required with the scheme hmac"),
    (["create", "ci", "--room", ROOM, "--mention", "bob"], 2, "--mention: is no user id"),
    (["create", "ci", "--room", ROOM, "--keep-requests", "21"], 2, "--keep-requests: must be a number"),
    (["create", "ci", "--room", ROOM, "--template", "/nowhere"], 2, "--template: cannot read /nowhere: No such"),
    (["create", "ci", "--room", ROOM, "--template", "-"], 2, "--template (/template/markdown): unexpected"),
    (["create", "ci", "--room", ROOM, "--secret-file", "-"], 2, "--secret-file: must be visible ASCII"),
    (["rotate", "none"], 1, "there is no hook none"),
    (["show", "none"], 1, "there is no hook none"),
    (["delete", "none"], 1, "there is no hook none"),
    (["requests", "none"], 1, "there is no hook none"),
    (["preview", "none", "-"], 1, "there is no hook none"),
    (["preview", "none", "-", "--header", "x"], 2, "--header: x is no header: write it like"),
    (["preview", "none"], 2, "give the file of a body (- is standard input), or the id of a kept request"),
]


@pytest.mark.usefixtures("upstream")
def test_what_is_wrong_is_a_line_that_names_the_option() -> None:
    for arguments, code, says in WRONG:
        done = hooks(*arguments, stdin="{{ a")
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("upstream")
def test_hooks_are_made_changed_rotated_and_deleted_beside_a_running_bridge(rooms: Rooms, tmp_path: Path) -> None:
    with serving() as (bridge, _):

        def answered(url: str, status: int) -> None:
            """Within 2 s, as the help says; on a busy machine it may be more."""
            path = url.split("/hooks/", 1)[1]
            until(lambda: tell(f"{bridge}/hooks/{path}", {"n": 1}).status_code == status)

        first, _ = create("ci", "--room", ROOM)
        assert tell(bridge + first[first.index("/hooks/") :], {"text": "at once"}).status_code == 200
        rooms.wait_for(1)
        rotated = hooks("rotate", "ci")
        assert "The hook ci has a new secret. The one before it is valid until 20" in rotated.stderr
        second = rotated.stdout.splitlines()[0]
        answered(second, 200)
        answered(first, 200)
        rotated = hooks("rotate", "ci", "--now")
        assert "The hook ci has a new secret. No older one is valid." in rotated.stderr
        third = rotated.stdout.splitlines()[0]
        answered(third, 200)
        answered(second, 401)
        (tmp_path / "new.txt").write_text("new: {{ payload.n }}")
        changed = hooks("create", "ci", "--room", ROOM, "--template", str(tmp_path / "new.txt"), "--replace")
        assert (changed.returncode, changed.stdout) == (0, ""), changed.stderr

        def says_so() -> bool:
            answered(third, 200)
            return "new: 1" in rooms.bodies

        until(says_so)
        newest = {"id": ""}

        def is_kept() -> bool:
            """Of the many requests above, those that are written last push out the others."""
            requests = hooks("requests", "ci", "--json")
            newest.update(json.loads(requests.stdout)["requests"][0])
            return '{"n":1}' in hooks("requests", "ci", newest["id"]).stdout.replace(" ", "")

        until(is_kept)
        previewed = hooks("preview", "ci", "--request", newest["id"])
        assert previewed.stdout == "new: 1\n"
        assert hooks("delete", "ci").returncode == 0
        answered(third, 401)
    assert listed() == []


def test_preview_reads_a_body_and_tries_a_template(upstream: Upstream, tmp_path: Path, rooms: Rooms) -> None:
    create("ci", "--room", ROOM)
    (tmp_path / "body.json").write_text('{"title": "Disk", "value": 0.5}')
    (tmp_path / "t.json").write_text('{"text": "{{ payload.title }}: {{ headers[\'x-event\'] }}"}')
    done = hooks("preview", "ci", "body.json", "--template", "t.json", "--header", "X-Event: full")
    assert (done.returncode, done.stdout) == (0, "Disk: full\n"), done.stderr
    assert json.loads(hooks("preview", "ci", "-", "--json", stdin='{"text": "x"}').stdout)["messages"][0]["text"] == "x"
    assert rooms.bodies == []


@pytest.mark.parametrize("is_running", [False, True])
def test_sample_is_sent_with_and_without_a_bridge(upstream: Upstream, rooms: Rooms, is_running: bool) -> None:
    create("ci", "--room", ROOM)
    if is_running:
        with serving():
            done = hooks("test", "ci")
    else:
        done = hooks("test", "ci")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("$")
    assert len(rooms.wait_for(1)) == 1


@pytest.mark.usefixtures("upstream")
def test_file_is_read_again_on_sighup_and_a_bad_one_keeps_the_old(tmp_path: Path) -> None:
    path, log = tmp_path / "hooks.yaml", tmp_path / "log"

    def write(text: str) -> None:
        path.write_text(text.format(room=ROOM, secret=CANARY))
        process.send_signal(signal.SIGHUP)

    path.write_text(f"- {{name: one, room: '{ROOM}', verification: {{secret: {CANARY}}}}}\n")
    with serving(log=log, FLOWBRIDGE_HOOKS_FILE="hooks.yaml", FLOWBRIDGE_LOG_LEVEL="debug") as (bridge, process):

        def status(name: str) -> int:
            return tell(f"{bridge}/hooks/{name}/{CANARY}", {"text": name}).status_code

        def ready() -> Any:
            answer = httpx.get(f"{bridge}/readyz", trust_env=False, timeout=PATIENCE)
            assert answer.status_code == 200, "what was read before is still in force"
            return answer.json()

        assert "hooks_file_refused" not in ready()
        assert (status("one"), status("two")) == (200, 401)
        write("- {{name: one, room: '{room}', template: '{{{{ payload|nope }}}}', verification: {{secret: {secret}}}}}")
        until(lambda: "filter nope is unknown" in log.read_text())
        write("- {{name: one, verification: {{secret: {secret}}}}}")
        until(lambda: "/0/room is required" in log.read_text())
        assert (status("one"), status("two")) == (200, 401)
        assert ready()["hooks_file_refused"] is True
        figures = httpx.get(f"{bridge}/metrics", trust_env=False, timeout=PATIENCE).text
        assert "flowbridge_hooks_file_refused 1.0" in figures
        write("- {{name: two, room: '{room}', verification: {{secret: {secret}}}}}")
        until(lambda: status("two") == 200)
        assert status("one") == 401
        assert "hooks_file_refused" not in ready()
        refused = hooks("delete", "two", FLOWBRIDGE_HOOKS_FILE="hooks.yaml")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "the hook two stands in hooks.yaml, which alone can change it" in refused.stderr
    assert CANARY not in log.read_text()


@pytest.mark.usefixtures("upstream")
def test_doctor_tells_of_a_bad_file() -> None:
    wrong = "- name: one\n  room: '!r:hs'\n- name: two\n"
    Path("hooks.yaml").write_text(wrong)
    done = run("doctor", BASE_URL="http://127.0.0.1:1", FLOWBRIDGE_HOOKS_FILE="hooks.yaml")
    assert "BAD  hooks        FLOWBRIDGE_HOOKS_FILE: hooks.yaml: /1/room is required" in done.stdout
    for text, says in (
        (wrong, "hooks.yaml: /1/room is required"),
        (
            "- name: one\n  room: '!r:hs'\n  template: '{{ payload|nope }}'\n",
            "hooks.yaml: the hook one: /template/markdown filter nope is unknown (line 1)",
        ),
        ("hooks: [", "hooks.yaml is not YAML: expected the node content, but found '<stream end>' at line 1"),
    ):
        Path("hooks.yaml").write_text(text)
        served = run("serve", "--port", "0", FLOWBRIDGE_HOOKS_FILE="hooks.yaml")
        assert (served.returncode, served.stdout) == (2, "")
        assert f"flowbridge: FLOWBRIDGE_HOOKS_FILE: {says}" in served.stderr


@pytest.mark.usefixtures("upstream")
def test_doctor_tells_of_templates_that_failed_and_secrets_that_it_cannot_read() -> None:
    create("ci", "--room", ROOM)
    create("gh", "--room", ROOM, "--scheme", "github")
    database = Database("sqlite:///flowbridge.db")
    database.open(shared=True)
    with database.engine.begin() as connection:
        store.note(connection, {}, {"ci": "no such filter"}, 1)
    database.close()
    good = run("doctor")
    assert "BAD  hooks        the template of ci failed, and a summary was sent: no such filter;" in good.stdout
    assert "the secret of gh" not in good.stdout
    bad = run("doctor", FLOWBRIDGE_SECRET_KEY=Fernet.generate_key().decode())
    assert "BAD  hooks        the secret of gh was written with another FLOWBRIDGE_SECRET_KEY" in bad.stdout
