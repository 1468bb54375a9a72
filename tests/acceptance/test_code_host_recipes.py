"""docs/hooks.md: the recipes of code hosts, from its own text, with bodies that these sent, signed as they sign.

FLOWBRIDGE_SCREENSHOTS=1 also makes the page's pictures again, of the events that the homeserver then has.
"""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from tests.acceptance.test_hook_recipes import PAGE, Desk, desk
from tests.acceptance.test_recipes import fields
from tests.http.hooked import signed
from tests.unit.sources.test_code_hosts import commits, loaded, pipeline, pushed, run

__all__ = ["desk"]
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


def post(url: str, body: bytes, headers: dict[str, str]) -> None:
    answer = httpx.post(url, content=body, headers=headers, trust_env=False)
    assert answer.status_code == 200, answer.text


def signature(body: bytes, secret: str) -> dict[str, str]:
    name, _, value = signed(body, secret).partition(": ")
    return {name: value}


@pytest.mark.timeout(300)
def test_github_reports_issues_pushes_and_runs(desk: Desk) -> None:
    before = len(desk.room.messages())
    entered = fields(desk.recipe("GitHub"))
    assert entered["Content type"] == JSON
    told_commits = (("8f1c0ad", "Say hello to the room"), ("c2b7e41", "Fix __init__ of the greeter"))
    change = [{**commits(1)[0], "id": id_ * 6, "message": message} for id_, message in told_commits]
    told: list[tuple[str, Any, str]] = [
        ("ping", loaded("github/ping"), JSON),
        ("issues", loaded("github/issues-opened"), FORM),
        ("push", pushed(commits=change), JSON),
        ("workflow_run", run("completed", "failure", at="2020-10-05T16:36:49Z"), JSON),
    ]
    for number, (event, payload, kind) in enumerate(told):
        body = json.dumps(payload).encode()
        body = urlencode({"payload": body}).encode() if kind == FORM else body
        headers = {"X-GitHub-Event": event, "X-GitHub-Delivery": f"recipe-{number}", "Content-Type": kind}
        post(entered["Payload URL"], body, headers | signature(body, entered["Secret"]))
    events = desk.wait_for(3, before)
    first = [event["content"]["body"].split("\n")[0].partition(" (https://")[0] for event in events]
    assert first == [
        "Codertocat/Hello-World: Codertocat opened issue #1 Spelling error in the README file",
        "octo-org/octo-repo: octocat pushed to main: 2 commits",
        "❌ octo-org/octo-repo: test failed on master after 3 min: run #163",
    ]
    desk.picture("hook-github", events, 0, 1, 2)


@pytest.mark.timeout(300)
def test_gitlab_reports_merge_requests_and_pipelines(desk: Desk) -> None:
    before = len(desk.room.messages())
    entered = fields(desk.recipe("GitLab"))
    red = pipeline("failed")
    red["builds"][2]["status"] = "failed"
    for kind, payload in (
        ("Merge Request Hook", loaded("gitlab/merge-request")),
        ("Note Hook", loaded("gitlab/note")),
        ("Pipeline Hook", red),
    ):
        headers = {"X-Gitlab-Event": kind, "Idempotency-Key": kind, "X-Gitlab-Token": entered["Secret token"]}
        post(entered["URL"], json.dumps(payload).encode(), headers | {"Content-Type": JSON})
    events = desk.wait_for(3, before)
    assert events[2]["content"]["body"].startswith("❌ gitlab-org/gitlab-test: pipeline_name failed on master")
    assert "\nFailed: test-build\n" in events[2]["content"]["body"]
    desk.picture("hook-gitlab", events, 0, 1, 2)


@pytest.mark.timeout(300)
def test_forgejo_reports_pull_requests(desk: Desk) -> None:
    before = len(desk.room.messages())
    entered = fields(desk.recipe("Gitea and Forgejo"))
    body = json.dumps(loaded("gitea/pull-request")).encode()
    headers = {f"X-{name}-Event": "pull_request" for name in ("Forgejo", "Gitea", "Gogs", "GitHub")}
    proof = {"X-Forgejo-Signature": signature(body, entered["Secret"])["X-Hub-Signature-256"].removeprefix("sha256=")}
    post(entered["Target URL"], body, {**headers, **proof, "Content-Type": entered["POST content type"]})
    (event,) = desk.wait_for(1, before)
    assert event["content"]["body"].startswith("example/example: example2 opened pull request #2 update")


def test_pictures_of_the_page_are_made_here() -> None:
    here = Path(__file__).read_text()
    made = set(re.findall(r'\.picture\("(hook-[a-z]+)"', here))
    assert made == {"hook-github", "hook-gitlab"}
    assert made <= set(re.findall(r"\(pictures/(hook-[a-z-]+)\.png\)", PAGE))
