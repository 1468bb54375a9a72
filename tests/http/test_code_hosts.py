"""What GitHub, GitLab and Forgejo send, through their hooks into a room: signed, as a form, again, and as stories."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.http.conftest import ROOM, Answer, Bridge
from tests.http.hooked import hooked, signed, tell
from tests.unit.sources.test_code_hosts import RUN, loaded, pipeline, run
from tests.unit.sources.test_github import examples  # noqa: F401 (a fixture)
from tests.upstream import Rooms, Upstream

GITLAB = "fh_the-secret-token-of-a-project-in-gitlab"
MORE = [
    {"name": "octo", "room": ROOM, "source": "github", "verification": {"scheme": "github", "secret": f"{GITLAB}-2"}},
    {
        "name": "gogs",
        "room": ROOM,
        "source": "gitea",
        "verification": {"scheme": "hmac", "header": "X-Gogs-Signature", "secret": f"{GITLAB}-3"},
    },
    {"name": "lab", "room": ROOM, "source": "gitlab", "verification": {"secret": GITLAB}},
]


@pytest.fixture(scope="module")
def shared_hooked(shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with hooked(shared_upstream, tmp_path_factory.mktemp("code"), *MORE) as bridge:
        yield bridge


@pytest.fixture
def bridge(shared_hooked: Bridge, upstream: Upstream, rooms: Rooms) -> Iterator[Bridge]:
    yield shared_hooked
    upstream.reset()
    shared_hooked.clear()


def github(bridge: Bridge, event: str, payload: Any, delivery: str, *, form: bool = False) -> Answer:
    """To a hook that finds out by itself who it is."""
    body = json.dumps(payload).encode()
    kind = "application/json"
    if form:  # GitHub's default, signed over its bytes
        body, kind = urlencode({"payload": body}).encode(), "application/x-www-form-urlencoded"
    headers = (f"X-GitHub-Event: {event}", f"X-GitHub-Delivery: {delivery}", f"Content-Type: {kind}")
    return tell(bridge, body, *headers, signed(body), path="/hooks/signed")


def settled(bridge: Bridge, answer: Answer) -> Answer:
    assert answer.status == 200, answer
    bridge.wait_until(answer.json()["delivery_id"], "sent")
    return answer


def contents(rooms: Rooms) -> list[dict[str, Any]]:
    return [event.content for event in rooms.events]


@pytest.mark.parametrize("form", [False, True])
def test_push_is_in_the_room_once(bridge: Bridge, rooms: Rooms, form: bool) -> None:
    payload, delivery = loaded("github/push-new-branch"), f"72d3162e-cc78-11e3-81ab-{form}"
    first = settled(bridge, github(bridge, "push", payload, delivery, form=form))
    again = github(bridge, "push", payload, delivery, form=form)  # "Redeliver"
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    (content,) = contents(rooms)
    assert content["body"].startswith("Codertocat/Hello-World: Codertocat created branch master: 1 commit (https://")
    assert content["format"] == "org.matrix.custom.html"
    assert "<li><code>6113728</code> <a href=" in content["formatted_body"]


def test_ping_is_answered_with_what_was_done(bridge: Bridge, rooms: Rooms) -> None:
    answer = github(bridge, "ping", loaded("github/ping"), "p1")
    assert answer.status == 200
    assert "a ping: the hook works" in json.dumps(answer.json())
    quiet = github(bridge, "workflow_run", run("requested"), "p2")
    assert quiet.status == 200
    assert (
        "workflow_run.requested, which is shown only if the hook's `ignore` has +workflow_run.requested"
        in json.dumps(quiet.json())
    )
    assert rooms.events == []


def test_unsigned_push_is_refused(bridge: Bridge, rooms: Rooms) -> None:
    body = json.dumps(loaded("github/push")).encode()
    assert tell(bridge, body, "X-GitHub-Event: push", path="/hooks/signed").status == 401
    assert tell(bridge, body, "X-GitHub-Event: push", signed(body, "another"), path="/hooks/signed").status == 401
    assert rooms.events == []


def test_run_is_a_notice_and_its_edit_and_a_failure_a_message(bridge: Bridge, rooms: Rooms) -> None:
    for number, payload in enumerate(
        (
            run("in_progress"),
            run("completed", "success", at="2020-10-05T16:36:49Z"),
            run("completed", "failure", attempt=2, at="2020-10-05T16:40:49Z"),
            run("completed", "success", attempt=3, at="2020-10-05T16:44:49Z"),
        )
    ):
        settled(bridge, github(bridge, "workflow_run", payload, f"run-{number}"))
    started, passed, failed, fixed = contents(rooms)
    assert (started["msgtype"], failed["msgtype"]) == ("m.notice", "m.text")
    assert started["body"].startswith("▶️ octo-org/octo-repo: test started on master")
    assert passed["m.relates_to"] == {"rel_type": "m.replace", "event_id": rooms.events[0].event_id}
    assert passed["m.new_content"]["body"].startswith("✅ octo-org/octo-repo: test passed on master after 3 min")
    assert "m.relates_to" not in failed
    assert failed["body"].startswith("❌ octo-org/octo-repo: test failed on master")
    assert fixed["m.relates_to"] == {"rel_type": "m.replace", "event_id": rooms.events[2].event_id}


def test_event_that_came_too_late_does_not_overwrite_a_newer_one(bridge: Bridge, rooms: Rooms) -> None:
    payload = loaded(RUN)
    payload["workflow_run"]["id"] = 5
    late = {**payload, "action": "in_progress"}
    late["workflow_run"] = {**payload["workflow_run"], "updated_at": "2020-10-05T16:00:00Z"}
    settled(bridge, github(bridge, "workflow_run", payload, "late-1"))
    settled(bridge, github(bridge, "workflow_run", late, "late-2"))
    (content,) = contents(rooms)
    assert content["body"].startswith("✅ octo-org/octo-repo: test passed")


def test_pipeline_of_gitlab_is_sent_with_its_token(bridge: Bridge, rooms: Rooms) -> None:
    headers = ("X-Gitlab-Event: Pipeline Hook", "Idempotency-Key: f5e5f430-f57b")
    payload = pipeline("failed")
    settled(bridge, tell(bridge, payload, *headers, f"X-Gitlab-Token: {GITLAB}", path="/hooks/lab"))
    again = tell(bridge, payload, *headers, f"X-Gitlab-Token: {GITLAB}", path="/hooks/lab")
    assert again.headers["idempotent-replayed"] == "true"
    assert tell(bridge, payload, *headers, "X-Gitlab-Token: fh_wrong-wrong-wrong", path="/hooks/lab").status == 401
    (content,) = contents(rooms)
    assert content["body"].startswith("❌ gitlab-org/gitlab-test: pipeline_name failed on master")


def test_forgejo_is_known_before_github(bridge: Bridge, rooms: Rooms) -> None:
    body = json.dumps(loaded("gitea/pull-request")).encode()
    names = ("Forgejo", "Gitea", "Gogs", "GitHub")
    headers = [f"X-{name}-{kind}" for name in names for kind in ("Event: pull_request", "Delivery: 5b")]
    settled(bridge, tell(bridge, body, *headers, signed(body), path="/hooks/signed"))
    (content,) = contents(rooms)
    assert content["body"].startswith("example/example: example2 opened pull request #2 update (http://")


def test_gogs_signs_in_a_header_of_its_own(bridge: Bridge, rooms: Rooms) -> None:
    body = json.dumps(loaded("gitea/issues-opened")).encode()
    proof = signed(body, f"{GITLAB}-3").replace("X-Hub-Signature-256: sha256=", "X-Gogs-Signature: ")
    settled(bridge, tell(bridge, body, "X-Gogs-Event: issues", proof, path="/hooks/gogs"))
    assert tell(bridge, body, "X-Gogs-Event: issues", proof[:-1], path="/hooks/gogs").status == 401
    assert [content["body"].partition(" (")[0] for content in contents(rooms)] == [
        "example/example: example opened issue #1 example"
    ]


def test_all_that_github_is_known_to_send_is_taken(
    bridge: Bridge,
    examples: dict[str, list[tuple[str, Any]]],  # noqa: F811
) -> None:
    """None is a 4xx or 5xx; what is not shown says why."""
    shown = []
    for number, (event, payload) in enumerate(each for found in examples.values() for each in found):
        answer = github(bridge, event, payload, f"all-{number}")
        assert answer.status == 200, (event, answer)
        found = answer.json()
        if "delivery_id" in found:
            shown.append(found["delivery_id"])
        else:
            assert event in found["done"], found
    assert len(shown) > 400
    bridge.wait_until(shown[-1], "sent")
