"""GitHub, GitLab, Gitea and Forgejo: what rooms read of recorded bodies, and the stories that these belong to."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowbridge import sources
from flowbridge.rendering.webhooks import webhook
from flowbridge.sources import BY_NAME, code_hosts
from flowbridge.sources.source import Incoming, Nothing, UnrecognisedError
from tests.unit.sources.test_alerting import GOLDEN, PAYLOADS, body, golden, only
from tests.unit.sources.test_mutations import OTHERS, Path_, paths

NAMES = ("forgejo", "gitea", "github", "gitlab")
EVENTS = {
    **dict.fromkeys(("gitea/issues-opened", "github/issues-opened", "github/issues-opened-empty-body"), "issues"),
    **dict.fromkeys(("gitea/pull-request", "github/pull-request-opened"), "pull_request"),
    **dict.fromkeys(("gitea/push", "github/push", "github/push-new-branch"), "push"),
    **dict.fromkeys(("gitea/release", "github/release-published"), "release"),
    "github/issue-comment-created": "issue_comment",
    "github/ping": "ping",
    "github/security-advisory": "security_advisory",
    "github/workflow-job-failure": "workflow_job",
    "github/workflow-run-completed": "workflow_run",
    "gitlab/issue": "Issue Hook",
    "gitlab/merge-request": "Merge Request Hook",
    "gitlab/note": "Note Hook",
    "gitlab/pipeline": "Pipeline Hook",
    "gitlab/push": "Push Hook",
    "gitlab/release": "Release Hook",
}
RECORDED = sorted(EVENTS)
SHOWN = [name for name in RECORDED if name != "github/ping"]
RUN = "github/workflow-run-completed"
ZERO = "0" * 40


def headers_of(name: str) -> dict[str, str]:
    source, event = name.partition("/")[0], EVENTS[name]
    if source == "gitea":  # GitHub's beside its own
        return {f"x-{each}-event": event for each in ("gitea", "gogs", "github")}
    return {f"x-{source}-event": event}


def made(payload: Any, headers: dict[str, str], *, source: str = "auto", ignore: tuple[str, ...] = ()) -> Any:
    given = {
        "source": source,
        "headers": headers,
        "per": "notification",
        "template": None,
        "is_text": False,
        "plain": False,
        "ignore": ignore,
    }
    return json.loads(webhook(payload if isinstance(payload, str) else json.dumps(payload), given)[0])


def github(event: str, payload: Any, **more: Any) -> Any:
    return made(payload, {"x-github-event": event}, **more)


def gitlab(payload: Any, **more: Any) -> Any:
    return made(payload, {"x-gitlab-event": "Some Hook"}, **more)


def gitea(event: str, payload: Any, **more: Any) -> Any:
    return made(payload, {"x-gitea-event": event, "x-github-event": event}, **more)


def loaded(name: str) -> Any:
    return json.loads(body(name))


def test_every_recorded_body_is_here() -> None:
    folders = ("gitea", "github", "gitlab")
    found = [
        str(file.relative_to(PAYLOADS).with_suffix("")) for each in folders for file in (PAYLOADS / each).iterdir()
    ]
    assert sorted(found) == RECORDED


@pytest.mark.parametrize("name", SHOWN)
def test_recorded_body_is_shown_as_it_was_looked_at(name: str) -> None:
    found = made(body(name), headers_of(name))
    assert found["warnings"] == []
    assert found["source"] == name.partition("/")[0]
    golden(GOLDEN / f"{name}.html", only(found)["html"])
    golden(GOLDEN / f"{name}.txt", only(found)["body"])


def test_ping_shows_nothing() -> None:
    found = made(body("github/ping"), headers_of("github/ping"))
    assert (found["messages"], found["nothing"], found["event"]) == ([], "a ping: the hook works", "ping")


# Who is it?


@pytest.mark.parametrize(
    ("headers", "source"),
    [
        (
            {"x-forgejo-event": "push", "x-gitea-event": "push", "x-gogs-event": "push", "x-github-event": "push"},
            "forgejo",
        ),
        ({"x-gitea-event": "push", "x-gogs-event": "push", "x-github-event": "push"}, "gitea"),
        ({"x-gogs-event": "push"}, "gitea"),
        ({"x-github-event": "push"}, "github"),
        ({"x-gitlab-event": "Push Hook"}, "gitlab"),
        ({"x-gitlab-event": "System Hook"}, "gitlab"),
        ({}, "generic"),
    ],
)
def test_source_is_told_by_its_headers(headers: dict[str, str], source: str) -> None:
    assert sources.find("auto", headers, {"ref": "refs/heads/main"}).name == source


@pytest.mark.parametrize(
    ("headers", "id_"),
    [
        ({"x-github-event": "push", "x-github-delivery": "72d3"}, "72d3"),
        ({"x-gitea-event": "push", "x-gitea-delivery": "f6266f16", "x-github-delivery": "f6266f16"}, "f6266f16"),
        ({"x-forgejo-event": "push", "x-forgejo-delivery": "9a"}, "9a"),
        ({"x-gogs-event": "push", "x-gogs-delivery": "5b"}, "5b"),
        ({"x-gitlab-event": "Push Hook", "idempotency-key": "f5e5f430"}, "f5e5f430"),
        ({"x-gitlab-event": "Push Hook", "webhook-id": "f5e5f430"}, "f5e5f430"),
        # A chain of events shares the one, and all of a hook's the other.
        ({"x-gitlab-event": "Push Hook", "x-gitlab-event-uuid": "13", "x-gitlab-webhook-uuid": "6a"}, ""),
    ],
)
def test_delivery_id_is_the_one_of_the_delivery(headers: dict[str, str], id_: str) -> None:
    assert made(body("github/push"), headers)["delivery_id"] == id_


@pytest.mark.parametrize("name", NAMES)
def test_sample_is_recognised_and_shown(name: str) -> None:
    source = BY_NAME[name]
    found = made(source.sample, dict(source.sample_headers))
    assert (found["source"], found["event"], found["warnings"]) == (name, "push", [])
    golden(GOLDEN / name / "sample.html", only(found)["html"])
    golden(GOLDEN / name / "sample.txt", only(found)["body"])


@pytest.mark.parametrize("name", [each for each in RECORDED if each.startswith(("github/", "gitea/"))])
def test_event_is_told_by_the_body_where_no_header_says_it(name: str) -> None:
    """As for a preview of a body alone."""
    source = name.partition("/")[0]
    assert made(body(name), {}, source=source)["event"] == made(body(name), headers_of(name))["event"]


@pytest.mark.parametrize(
    ("source", "payload", "warning"),
    [
        ("github", [], "GitHub: is no JSON object"),
        ("github", {"hello": 1}, "GitHub: has no header X-GitHub-Event, and its keys do not say what has happened"),
        ("gitea", {"hello": 1}, "Gitea: has no header X-Gitea-Event, and its keys do not say what has happened"),
        ("forgejo", "text", "Forgejo: is no JSON object"),
        ("gitlab", {"hello": 1}, "GitLab: has neither `object_kind` nor `event_name`"),
        ("gitlab", None, "GitLab: is no JSON object"),
    ],
)
def test_what_a_source_does_not_know_is_sent_as_a_summary(source: str, payload: Any, warning: str) -> None:
    found = made(json.dumps(payload), {}, source=source)
    assert found["warnings"] == [f"{warning}; a summary was sent"]
    assert only(found)["body"]


# Commits.


def pushed(**more: Any) -> Any:
    return {**BY_NAME["github"].sample, **more}


def commits(number: int) -> list[Any]:
    (commit,) = BY_NAME["github"].sample["commits"]
    return [
        {**commit, "id": f"{index:040x}", "message": f"Commit {index}\n\nIts body"} for index in range(1, number + 1)
    ]


def test_five_commits_are_listed_and_the_others_counted() -> None:
    message = only(github("push", pushed(commits=commits(17))))
    assert "octocat pushed to main: 17 commits (https://github.com/octo-org/octo-repo/compare/" in message["body"]
    assert message["body"].count("\n- 0000000 Commit ") == 5
    assert "Its body" not in message["body"]
    assert message["html"].count("<li>") == 6
    assert 'compare/6113728f27ae...ec26c3e57ca3">… and 12 more</a></li>' in message["html"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"ref": "refs/heads/a/b"}, "octocat pushed to a/b: 1 commit ("),
        ({"forced": True}, "octocat force-pushed to main: 1 commit ("),
        ({"forced": True, "commits": []}, "octocat force-pushed to main"),
        ({"created": True, "commits": []}, "octocat created branch main"),
        ({"before": ZERO, "created": False}, "octocat created branch main: 1 commit ("),
        ({"deleted": True, "after": ZERO, "commits": []}, "octocat deleted branch main"),
        ({"ref": "refs/tags/v1", "created": True, "commits": []}, "octocat created tag v1"),
        ({"ref": "refs/tags/v1", "deleted": True}, "octocat deleted tag v1"),
    ],
)
def test_push_says_what_became_of_the_branch(more: Any, said: str) -> None:
    first = only(github("push", pushed(**more)))["body"].split("\n")[0]
    assert first.startswith(f"octo-org/octo-repo: {said}")
    assert said.endswith("(") or first == f"octo-org/octo-repo: {said}"


@pytest.mark.parametrize("text", ["__init__", "5*3*2", "<b>&amp;", "[a](http://b)", "# one", "`x`", "@room", "1. a"])
def test_titles_and_commits_are_no_markdown(text: str) -> None:
    change = commits(1)
    change[0]["message"] = text
    issue = loaded("github/issues-opened")
    issue["issue"]["title"] = text
    for message in (only(github("push", pushed(commits=change))), only(github("issues", issue))):
        assert text in message["body"]
        assert "<b>" not in message["html"]
        assert "<em>" not in message["html"]
        assert "<h1>" not in message["html"]


def test_text_of_an_author_is_markdown() -> None:
    issue = loaded("github/issues-opened")
    issue["issue"]["body"] = "It is **urgent**: see [the log](https://example.org/log)\n\n- one\n- two\n\n<b>no</b>"
    html = only(github("issues", issue))["html"]
    assert "<strong>urgent</strong>" in html
    assert '<a href="https://example.org/log">the log</a>' in html
    assert "<li>one</li>" in html
    assert "&lt;b&gt;no&lt;/b&gt;" in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<!-- Describe the bug -->\nIt is broken", "It is broken"),
        ("A <!-- one --> and <!-- two --> b <!-- open", "A  and  b"),
        ("Bumps a from 1 to 2.\n\n<details>\n<summary>Notes</summary>\nlong\n</details>", "Bumps a from 1 to 2. …"),
        ("<details>only</details>", "<details>only</details>"),
        ('See <img width="9" alt="x" src="https://e.org/a.png"> it', "See [picture](https://e.org/a.png) it"),
        ('<img src="javascript:alert(1)">', ""),
        ("one<br>two<br/>three<BR />four\r\nfive", "one\ntwo\nthree\nfour\nfive"),
        ("word " * 200, ("word " * 140)[:-6] + "…"),
        ("x" * 2_000, "x" * 699 + "…"),
        (None, ""),
        ([], ""),
    ],
)
def test_quote_is_what_a_room_wants_to_read_of_a_text(text: Any, shown: str) -> None:
    assert code_hosts.quote({"body": text}, "body") == shown


@pytest.mark.parametrize("piece", ["<!--", "<!-- -->", "<img ", "<img src='x' ", "<details>", "<br", "> ", "\t\n", "`"])
def test_quote_takes_no_longer_for_hostile_text(piece: str) -> None:
    begun = time.process_time()
    code_hosts.quote({"body": piece * (1_000_000 // len(piece))}, "body")
    assert time.process_time() - begun < 0.2


# Issues and pull requests.


@pytest.mark.parametrize(
    ("action", "more", "said"),
    [
        ("opened", {"draft": True}, "opened draft pull request #2"),
        ("closed", {"merged": True}, "merged pull request #2"),
        ("closed", {"merged": False}, "closed without merging: pull request #2"),
        ("ready_for_review", {}, "marked as ready for review: pull request #2"),
        ("converted_to_draft", {}, "made a draft again: pull request #2"),
        ("reopened", {}, "reopened pull request #2"),
        ("review_requested", {}, "asked for a review of pull request #2"),
    ],
)
def test_pull_request_says_what_happened(action: str, more: Any, said: str) -> None:
    payload = loaded("github/pull-request-opened")
    payload["action"] = action
    payload["pull_request"] |= more
    message = only(github("pull_request", payload))
    assert message["event"] == f"pull_request.{action}"
    assert message["body"].startswith(f"Codertocat/Hello-World: Codertocat {said} Update the README")
    assert ("\nchanges → master (+1 -1 in 1 file)" in message["body"]) == (
        action in ("opened", "reopened", "ready_for_review") or said.startswith("merged")
    )


def test_review_is_asked_of_somebody() -> None:
    payload = {
        **loaded("github/pull-request-opened"),
        "action": "review_requested",
        "requested_reviewer": {"login": "mona"},
    }
    assert "Codertocat asked mona to review pull request #2" in only(github("pull_request", payload))["body"]
    del payload["requested_reviewer"]
    payload["requested_team"] = {"name": "docs"}
    assert "Codertocat asked docs to review pull request #2" in only(github("pull_request", payload))["body"]


@pytest.mark.parametrize(
    ("state", "text", "said"),
    [
        ("approved", None, "👍 Codertocat/Hello-World: Codertocat approved pull request #2"),
        ("changes_requested", "No.", "✋ Codertocat/Hello-World: Codertocat requested changes to pull request #2"),
        ("commented", "Hm.", "Codertocat/Hello-World: Codertocat reviewed pull request #2"),
        ("commented", None, ""),  # its comments are events of their own
    ],
)
def test_review_says_its_state(state: str, text: str | None, said: str) -> None:
    payload = {
        **loaded("github/pull-request-opened"),
        "action": "submitted",
        "review": {"state": state, "body": text, "html_url": "https://github.com/r"},
    }
    found = github("pull_request_review", payload)
    assert only(found)["body"].startswith(said) if said else found["messages"] == []
    assert not text or f"\n\n> {text}" in only(found)["body"]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("completed", "closed issue #1"),
        ("not_planned", "closed as not planned: issue #1"),
        ("duplicate", "closed as a duplicate: issue #1"),
    ],
)
def test_issue_says_why_it_was_closed(reason: str, said: str) -> None:
    payload = {**loaded("github/issues-opened"), "action": "closed"}
    payload["issue"]["state_reason"] = reason
    assert f"Codertocat {said} " in only(github("issues", payload))["body"]


# What is quiet, and what a hook's `ignore` says.


@pytest.mark.parametrize(
    ("ignore", "is_shown"),
    [
        ((), False),
        (("+issues.labeled",), True),
        (("+issues",), True),
        (("+issues", "issues.labeled"), False),
        (("issues", "+issues.labeled"), True),
        (("issues",), False),
        (("+push",), False),
    ],
)
def test_quiet_event_is_shown_where_the_hook_wants_it(ignore: tuple[str, ...], is_shown: bool) -> None:
    payload = {**loaded("github/issues-opened"), "action": "labeled", "label": {"name": "bug"}}
    found = github("issues", payload, ignore=ignore)
    assert found["event"] == "issues.labeled"
    assert bool(found["messages"]) == is_shown
    assert not is_shown or "added the label bug to issue #1" in only(found)["body"]


def test_hook_says_why_nothing_is_shown() -> None:
    payload = {**loaded("github/issues-opened"), "action": "labeled"}
    quiet = "issues.labeled, which is shown only if the hook's `ignore` has +issues.labeled"
    assert github("issues", payload)["nothing"] == quiet
    payload["action"] = "opened"
    ignored = github("issues", payload, ignore=("issues.opened",))
    assert ignored["nothing"] == "issues.opened, which the hook's `ignore` has"


@pytest.mark.parametrize(("conclusion", "is_shown"), [("success", False), ("failure", True), ("cancelled", True)])
def test_green_runs_alone_can_be_ignored(conclusion: str, is_shown: bool) -> None:
    payload = loaded(RUN)
    payload["workflow_run"]["conclusion"] = conclusion
    found = github("workflow_run", payload, ignore=("workflow_run.completed.success",))
    assert bool(found["messages"]) == is_shown


# Stories.


def run(action: str, conclusion: str | None = None, attempt: int = 1, at: str = "2020-10-05T16:33:49Z") -> Any:
    payload = {**loaded(RUN), "action": action}
    payload["workflow_run"] |= {"conclusion": conclusion, "run_attempt": attempt, "updated_at": at}
    return payload


def test_run_is_one_story_from_its_start_to_its_end() -> None:
    started = only(github("workflow_run", run("in_progress")))
    passed = only(github("workflow_run", run("completed", "success", at="2020-10-05T16:36:49Z")))
    assert started["key"] == passed["key"] == "workflow_run/289782451"
    assert (started["state"], passed["state"]) == ("resolved", "resolved")  # neither pings
    assert passed["time"] - started["time"] == 180_001
    assert started["body"].startswith("▶️ octo-org/octo-repo: test started on master: run #163 (https://")
    assert passed["body"].startswith("✅ octo-org/octo-repo: test passed on master after 3 min: run #163 (https://")


def test_end_of_a_run_comes_after_its_beginning_in_the_same_second() -> None:
    started, passed = (
        only(github("workflow_run", run(*each))) for each in (("in_progress",), ("completed", "success"))
    )
    assert passed["time"] > started["time"]
    assert only(gitlab(pipeline("success")))["time"] > only(gitlab(pipeline("running")))["time"]


def test_run_leads_to_its_pull_requests() -> None:
    payload = run("completed", "failure", attempt=2)
    payload["workflow_run"]["pull_requests"] = [{"number": 3}, {"number": None}, None]
    assert (
        "\nPull request: #3 (https://github.com/octo-org/octo-repo/pull/3) · Attempt: 2"
        in only(github("workflow_run", payload))["body"]
    )


def test_failed_run_fires_with_each_attempt_and_a_later_one_resolves_it() -> None:
    first = only(github("workflow_run", run("completed", "failure")))
    again = only(github("workflow_run", run("completed", "failure", attempt=2)))
    green = only(github("workflow_run", run("completed", "success", attempt=3)))
    assert first["key"] == again["key"] == green["key"]
    assert [each["state"] for each in (first, again, green)] == ["firing", "firing", "resolved"]
    assert first["firing"] != again["firing"]  # newly firing: a message of its own
    assert green["firing"] == []
    assert "❌ octo-org/octo-repo: test failed on master" in first["body"]
    assert "\nAttempt: 2" in again["body"]


@pytest.mark.parametrize(
    ("conclusion", "state", "is_shown", "said"),
    [
        ("failure", "firing", True, "❌ octo-org/octo-repo: test failed on master"),
        ("timed_out", "firing", True, "❌ octo-org/octo-repo: test timed out on master"),
        ("startup_failure", "firing", True, "❌ octo-org/octo-repo: test could not start on master"),
        ("action_required", "firing", True, "✋ octo-org/octo-repo: test waits for approval on master"),
        ("cancelled", "resolved", True, "⏹️ octo-org/octo-repo: test was cancelled on master"),
        ("skipped", "resolved", False, "⏭️ octo-org/octo-repo: test was skipped on master"),
        ("neutral", "resolved", False, "◽ octo-org/octo-repo: test ended without a verdict on master"),
        ("stale", "resolved", False, "◽ octo-org/octo-repo: test was given up on master"),
        ("new_in_2031", "resolved", True, "octo-org/octo-repo: test ended: new in 2031 on master"),
        (None, "resolved", True, "octo-org/octo-repo: test ended: unknown on master"),
    ],
)
def test_run_says_how_it_ended(conclusion: str | None, state: str, is_shown: bool, said: str) -> None:
    payload = run("completed", conclusion)
    assert bool(github("workflow_run", payload)["messages"]) == is_shown
    message = only(github("workflow_run", payload, ignore=("+workflow_run",)))
    assert message["body"].startswith(said)
    assert message["state"] == state


@pytest.mark.parametrize(("action", "is_shown"), [("requested", False), ("in_progress", True)])
def test_run_that_has_not_begun_is_quiet(action: str, is_shown: bool) -> None:
    assert bool(github("workflow_run", run(action))["messages"]) == is_shown


def test_only_jobs_that_fail_are_shown() -> None:
    payload = loaded("github/workflow-job-failure")
    payload["workflow_job"]["conclusion"] = "success"
    assert github("workflow_job", payload)["messages"] == []
    for action in ("queued", "waiting", "in_progress"):
        assert github("workflow_job", {**payload, "action": action})["messages"] == []


@pytest.mark.parametrize("kind", ["check_run", "check_suite"])
def test_checks_that_are_workflows_are_quiet(kind: str) -> None:
    """Its run is an event of its own."""
    payload = {"action": "completed", kind: {"id": 1, "conclusion": "failure", "app": {"slug": "github-actions"}}}
    assert github(kind, payload)["messages"] == []
    payload[kind]["app"]["slug"] = "netlify"  # type: ignore[index]
    assert only(github(kind, payload))["state"] == "firing"
    assert github(kind, {**payload, "action": "created"})["messages"] == []


def test_deployment_is_one_story() -> None:
    deployment = {
        "id": 7,
        "ref": "main",
        "environment": "production",
        "sha": "a" * 40,
        "created_at": "2026-01-01T00:00:00Z",
    }
    base = {"action": "created", "deployment": deployment, "sender": {"login": "octocat"}}

    def status(state: str) -> Any:
        found = {
            "state": state,
            "log_url": "https://ci.example.org/7",
            "environment_url": "https://example.org",
            "created_at": "2026-01-01T00:01:00Z",
        }
        return only(github("deployment_status", {**base, "deployment_status": found}))

    begun, running, failed, done = (
        only(github("deployment", base)),
        *(status(each) for each in ("in_progress", "failure", "success")),
    )
    assert {each["key"] for each in (begun, running, failed, done)} == {"deployment/7"}
    assert [each["state"] for each in (begun, running, failed, done)] == ["resolved", "resolved", "firing", "resolved"]
    assert begun["body"] == "▶️ main is being deployed to production by octocat\naaaaaaa"
    details = "details (https://ci.example.org/7)\naaaaaaa"
    assert failed["body"] == f"❌ main could not be deployed to production by octocat: {details}"
    assert done["body"] == (f"✅ main was deployed to production by octocat: {details}\nSite: https://example.org")
    for state in ("queued", "pending", "waiting", "inactive"):
        found = {**base, "deployment_status": {"state": state}}
        assert github("deployment_status", found)["messages"] == []


def test_commit_status_is_one_story_for_each_context() -> None:
    payload = {
        "sha": "a" * 40,
        "context": "ci/jenkins",
        "target_url": "https://j.org/1",
        "branches": [{"name": "main"}],
        "repository": {"full_name": "octo/repo"},
    }
    red = only(github("status", {**payload, "state": "failure", "description": "2 tests failed"}))
    green = only(github("status", {**payload, "state": "success"}))
    assert red["key"] == green["key"]
    assert (red["state"], green["state"]) == ("firing", "resolved")
    assert red["body"].startswith(
        "❌ octo/repo: ci/jenkins failed on main: details (https://j.org/1)\n2 tests failed\n"
    )
    assert github("status", {**payload, "state": "pending"})["messages"] == []


def test_dependabot_alert_fires_until_it_is_fixed() -> None:
    payload = {
        "action": "created",
        "repository": {"full_name": "octo/repo"},
        "alert": {
            "number": 20,
            "html_url": "https://github.com/octo/repo/security/dependabot/20",
            "dependency": {"package": {"name": "semver"}, "manifest_path": "package-lock.json"},
            "security_advisory": {"summary": "semver is slow", "severity": "medium", "cve_id": "CVE-2022-25883"},
        },
    }
    found = [only(github("dependabot_alert", {**payload, "action": each})) for each in ("created", "fixed", "reopened")]
    assert [each["state"] for each in found] == ["firing", "resolved", "firing"]
    assert {each["key"] for each in found} == {"dependabot_alert/octo/repo/20"}
    assert found[0]["body"] == (
        "⚠️ octo/repo: Dependabot alert #20: CVE-2022-25883 semver is slow"
        " (https://github.com/octo/repo/security/dependabot/20)\n"
        "Severity: medium · Package: semver · File: package-lock.json"
    )


def test_unknown_event_is_told_in_a_line() -> None:
    payload = {"action": "reticulated", "repository": {"full_name": "octo/repo"}, "sender": {"login": "octocat"}}
    message = only(github("spline_bundle", payload))
    assert message["body"] == "octo/repo: octocat reticulated a spline bundle"
    assert message["event"] == "spline_bundle.reticulated"
    payload["spline_bundle"] = {"name": "nurbs", "html_url": "https://github.com/s"}
    assert only(github("spline_bundle", payload))["body"] == (
        "octo/repo: octocat reticulated the spline bundle nurbs (https://github.com/s)"
    )
    assert only(github("spline_bundle", {}))["body"] == "Spline bundle"


def test_template_of_a_hook_sees_what_ours_shows() -> None:
    html = "{{ icon }}|{{ repository }}|{{ who }}|{{ title }}|{{ url }}|{{ outcome }}|{{ event }}|{{ state }}"
    given = {
        "source": "auto",
        "headers": headers_of(RUN),
        "per": "notification",
        "template": {"text": html},
        "is_text": False,
        "plain": False,
    }
    found = json.loads(webhook(body(RUN), given)[0])
    assert only(found)["body"] == (
        "✅|octo-org/octo-repo|Codertocat|test passed on master: run #163"
        "|https://github.com/octo-org/octo-repo/actions/runs/289782451|success|workflow_run.completed|resolved"
    )


# GitLab.


def pipeline(status: str, **more: Any) -> Any:
    payload = loaded("gitlab/pipeline")
    payload["object_attributes"] |= {"status": status, **more}
    return payload


def test_pipeline_is_one_story() -> None:
    started, passed, failed = (only(gitlab(pipeline(each))) for each in ("running", "success", "failed"))
    assert {each["key"] for each in (started, passed, failed)} == {"pipeline/gitlab-org/gitlab-test/31"}
    assert [each["state"] for each in (started, passed, failed)] == ["resolved", "resolved", "firing"]
    assert [each["event"] for each in (started, failed)] == ["pipeline.running", "pipeline.failed"]
    for status in ("created", "waiting_for_resource", "preparing", "pending", "skipped", "manual", "scheduled"):
        assert gitlab(pipeline(status))["messages"] == []


def test_failed_pipeline_names_the_jobs_that_failed_and_may_not() -> None:
    payload = pipeline("failed")
    payload["builds"][0] |= {"status": "failed"}
    payload["builds"][1] |= {"status": "failed", "allow_failure": True}
    payload["builds"][2] |= {"status": "failed"}
    message = only(gitlab(payload))
    assert "\nFailed: production, test-build\n" in message["body"]
    retried = pipeline("failed", finished_at="2016-08-12 15:40:00 UTC")
    assert only(gitlab(retried))["firing"] != message["firing"]  # a retry that fails again is news


def test_time_of_a_pipeline_is_that_of_the_last_thing_it_did() -> None:
    """GitLab says when it was created, and that stays the same."""
    started = pipeline("running", finished_at=None)
    assert only(gitlab(started))["time"] == 1471015589000  # a job of it ended
    started["builds"] = []
    assert only(gitlab(started))["time"] == 1471015408000


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2021-04-28 21:50:00 +0200", 1619639400000),
        ("2021-04-28 19:50:00 UTC", 1619639400000),
        ("2021-04-28T19:50:00Z", 1619639400000),
        ("2021-04-28 12:50:00 -0700", 1619639400000),
    ],
)
def test_times_of_gitlab_are_understood(text: str, moment: int) -> None:
    payload = {"object_kind": "deployment", "status": "success", "deployment_id": 1, "status_changed_at": text}
    assert only(gitlab({**payload, "project": {"name": "x"}}))["time"] == moment


@pytest.mark.parametrize(
    ("action", "more", "said"),
    [
        ("open", {"draft": True}, "opened draft merge request !1"),
        ("merge", {}, "merged merge request !1"),
        ("close", {}, "closed merge request !1"),
        ("approved", {}, "approved merge request !1"),
        ("approval", {}, "approved merge request !1"),
    ],
)
def test_merge_request_says_what_happened(action: str, more: Any, said: str) -> None:
    payload = loaded("gitlab/merge-request")
    payload["object_attributes"] |= {"action": action, **more}
    message = only(gitlab(payload))
    assert f"Administrator {said} MS-Viewport (" in message["body"]
    assert message["event"] == f"merge_request.{action}"


def test_updates_in_gitlab_are_quiet_and_say_what_changed() -> None:
    payload = loaded("gitlab/merge-request")
    payload["object_attributes"]["action"] = "update"
    payload["changes"] = {"updated_at": {}, "title": {}, "milestone_id": {}}
    assert gitlab(payload)["messages"] == []
    assert "\nChanged: title, milestone" in only(gitlab(payload, ignore=("+merge_request",)))["body"]
    payload["object_attributes"]["oldrev"] = "a" * 40
    assert "pushed to merge request !1" in only(gitlab(payload, ignore=("+merge_request",)))["body"]


def test_confidential_issue_says_so() -> None:
    payload = loaded("gitlab/issue")
    payload["object_attributes"]["confidential"] = True
    assert "Administrator opened confidential issue #23" in only(gitlab(payload))["body"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"before": ZERO}, "octo/hello: Monalisa created branch main: 1 commit (https://"),
        ({"after": ZERO, "commits": []}, "octo/hello: Monalisa deleted branch main"),
        (
            {"object_kind": "tag_push", "ref": "refs/tags/v1", "before": ZERO},
            "octo/hello: Monalisa created tag v1 (https://",
        ),
        ({"object_kind": "tag_push", "ref": "refs/tags/v1", "after": ZERO}, "octo/hello: Monalisa deleted tag v1"),
    ],
)
def test_gitlab_push_says_what_became_of_the_branch(more: Any, said: str) -> None:
    assert only(gitlab({**BY_NAME["gitlab"].sample, **more}))["body"].startswith(said)


PROJECT = {"web_url": "https://gitlab.example.org/octo/hello", "path_with_namespace": "octo/hello"}
MONA = {"name": "Mona", "username": "mona"}


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (
            {
                "object_kind": "build",
                "build_id": 9,
                "build_name": "test",
                "build_stage": "check",
                "build_status": "failed",
                "build_failure_reason": "script_failure",
                "build_duration": 61.5,
                "ref": "main",
                "commit": {"sha": "a" * 40, "message": "Fix\n\nit"},
            },
            (
                "❌ octo/hello: Job test failed on main after 1 min: details"
                " (https://gitlab.example.org/octo/hello/-/jobs/9)\n"
                "Stage: check · Reason: script failure\naaaaaaa Fix — Mona"
            ),
        ),
        (
            {"object_kind": "job", "job_id": 9, "job_name": "test", "job_status": "failed", "job_stage": "check"},
            ("❌ octo/hello: Job test failed: details (https://gitlab.example.org/octo/hello/-/jobs/9)\nStage: check"),
        ),
        (
            {
                "object_kind": "deployment",
                "status": "failed",
                "deployment_id": 3,
                "environment": "staging",
                "ref": "main",
                "deployable_url": "https://gitlab.example.org/j",
                "short_sha": "aaaaaaa",
                "commit_title": "Fix",
            },
            (
                "❌ octo/hello: main could not be deployed to staging by Mona: details (https://gitlab.example.org/j)"
                "\naaaaaaa Fix"
            ),
        ),
        (
            {
                "object_kind": "wiki_page",
                "object_attributes": {"title": "Home", "url": "https://g.org/w", "action": "create"},
            },
            "octo/hello: Mona created the wiki page Home (https://g.org/w)",
        ),
        (
            {"object_kind": "feature_flag", "object_attributes": {"name": "dark_mode", "active": True}},
            "octo/hello: Mona turned on the feature flag dark_mode",
        ),
        (
            {"object_kind": "access_token", "object_attributes": {"name": "ci", "expires_at": "2026-12-24"}},
            "⚠️ octo/hello: The access token ci expires on 2026-12-24",
        ),
        (
            {"object_kind": "milestone", "object_attributes": {"iid": 2, "title": "v2", "action": "close"}},
            "octo/hello: Mona closed the milestone v2 (https://gitlab.example.org/octo/hello/-/milestones/2)",
        ),
        (
            {
                "object_kind": "vulnerability",
                "object_attributes": {
                    "title": "XSS",
                    "state": "detected",
                    "severity": "high",
                    "url": "https://g.org/v",
                },
            },
            "⚠️ octo/hello: Vulnerability (detected): XSS (https://g.org/v)\nSeverity: high",
        ),
        (
            {
                "object_kind": "note",
                "object_attributes": {"noteable_type": "Commit", "note": "Nice", "url": "https://g.org/n"},
                "commit": {"id": "a" * 40, "title": "Fix"},
            },
            "octo/hello: Mona commented on commit aaaaaaa Fix (https://g.org/n)\n\n> Nice",
        ),
        (
            {"object_kind": "spline", "object_attributes": {"title": "nurbs", "action": "reticulate"}},
            "octo/hello: Spline: nurbs — reticulate by Mona",
        ),
    ],
)
def test_gitlab_event_is_told_in_words(payload: Any, said: str) -> None:
    assert only(gitlab({"project": PROJECT, "user": MONA, **payload}))["body"] == said


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (
            {"event_name": "project_create", "name": "Hello", "path_with_namespace": "octo/hello"},
            "octo/hello: Project Hello was created",
        ),
        (
            {
                "event_name": "user_add_to_group",
                "group_path": "octo",
                "user_name": "Mona",
                "group_access": "Maintainer",
            },
            "octo: Mona was added to the group (Maintainer)",
        ),
        ({"event_name": "user_failed_login", "name": "Mona", "state": "blocked"}, "User failed login: Mona"),
    ],
)
def test_system_hook_is_told_in_words(payload: Any, said: str) -> None:
    found = made(payload, {"x-gitlab-event": "System Hook"})
    assert only(found)["body"] == said
    assert found["event"] == payload["event_name"]


# Gitea and Forgejo.


@pytest.mark.parametrize(
    ("event", "more", "said"),
    [
        ("pull_request", {"action": "closed", "pull_request": {"merged": True}}, "example2 merged pull request #2"),
        ("pull_request_approved", {"action": "reviewed", "review": {"type": "pull_request_review_approved"}}, "👍 "),
        (
            "pull_request_rejected",
            {"action": "reviewed", "review": {"type": "pull_request_review_rejected", "content": "No."}},
            "✋ example/example: example2 requested changes to pull request #2",
        ),
        (
            "pull_request_comment",
            {"action": "reviewed", "review": {"type": "pull_request_review_comment", "content": "Hm."}},
            "example2 reviewed pull request #2",
        ),
    ],
)
def test_gitea_says_what_happened_to_a_pull_request(event: str, more: Any, said: str) -> None:
    payload = loaded("gitea/pull-request")
    more["pull_request"] = {**payload["pull_request"], **more.get("pull_request", {})}
    message = only(gitea(event, {**payload, **more}))
    assert said in message["body"]
    content = more.get("review", {}).get("content")
    assert not content or f"> {content}" in message["body"]


def test_gitea_labels_and_pushes_to_pull_requests_are_quiet() -> None:
    payload = loaded("gitea/pull-request")
    payload["pull_request"]["labels"] = [{"name": "bug"}]
    for action, said in (
        ("label_updated", "changed the labels of pull request #2 update"),
        ("synchronized", "pushed to"),
    ):
        assert gitea("pull_request", {**payload, "action": action})["messages"] == []
        message = only(gitea("pull_request", {**payload, "action": action}, ignore=("+pull_request",)))
        assert said in message["body"]


def test_fork_in_gitea_is_of_the_forkee() -> None:
    """GitHub's is the other way round."""
    old, new = ({"full_name": f"{owner}/it", "html_url": f"https://git.example.org/{owner}/it"} for owner in "ab")
    payload = {"forkee": old, "repository": new, "sender": {"login": "b"}}
    assert (
        only(gitea("fork", payload))["body"] == "a/it: b forked the repository to b/it (https://git.example.org/b/it)"
    )
    payload = {"forkee": new, "repository": old, "sender": {"login": "b"}}
    assert (
        only(github("fork", payload))["body"] == "a/it: b forked the repository to b/it (https://git.example.org/b/it)"
    )


def test_gitea_says_who_was_assigned() -> None:
    payload = {**loaded("gitea/issues-opened"), "action": "assigned"}
    payload["issue"]["assignee"] = {"login": "mona"}
    assert "example assigned mona to issue #1 example (" in only(gitea("issues", payload))["body"]


def test_sub_issue_is_told_once() -> None:
    payload = {
        "sender": {"login": "octocat"},
        "sub_issue": {"number": 3, "title": "Part"},
        "parent_issue": {"number": 1, "title": "Whole", "html_url": "https://github.com/o/r/issues/1"},
    }
    told = only(github("sub_issues", {**payload, "action": "sub_issue_added"}))["body"]
    assert told == 'octocat added sub-issue "Part" to #1 Whole (https://github.com/o/r/issues/1)'
    assert github("sub_issues", {**payload, "action": "parent_issue_added"})["messages"] == []


def test_secret_in_an_old_gitea_body_is_not_shown() -> None:
    payload = {**loaded("gitea/push"), "secret": "CANARY"}
    assert "CANARY" not in json.dumps(gitea("push", payload))


def test_action_of_forgejo_fails_and_recovers() -> None:
    action_run = {
        "id": 9,
        "title": "Fix the build",
        "workflow_id": "test.yml",
        "prettyref": "main",
        "index_in_repo": 12,
        "commit_sha": "a" * 40,
        "html_url": "https://codeberg.org/o/r/actions/runs/12",
        "repository": {"full_name": "o/r"},
        "trigger_user": {"login": "mona"},
        "started": "2026-01-01T00:00:00Z",
        "stopped": "2026-01-01T00:02:00Z",
    }

    def done(action: str, **more: Any) -> Any:
        payload = {"action": action, "run": {**action_run, **more}}
        return only(made(payload, {"x-forgejo-event": f"action_run_{action}"}))

    red, green = done("failure"), done("recover", id=10)
    assert red["body"] == (
        "❌ o/r: test.yml failed on main after 2 min: run #12 (https://codeberg.org/o/r/actions/runs/12)"
        "\naaaaaaa Fix the build — mona"
    )
    assert green["body"].startswith("✅ o/r: test.yml has recovered: passed on main")
    assert (red["key"], red["state"]) == (green["key"], "firing")
    assert green["state"] == "resolved"


# Bodies that are not as documented.


def read(name: str, payload: Any, headers: dict[str, str]) -> None:
    """`read` itself may raise UnrecognisedError alone."""
    source = BY_NAME[name]
    assert isinstance(source.delivery_id(headers, payload), str)
    try:
        found = source.read(Incoming(payload, headers))
    except UnrecognisedError:
        return
    assert isinstance(found, Nothing) or found[0].view["title"]


def assign(value: Any, path: Path_, other: Any) -> Any:
    """In place: a copy of 26 kB for each of 15,000 changes would take a minute. Returns what was there."""
    for key in path[:-1]:
        value = value[key]
    before, value[path[-1]] = value[path[-1]], other
    return before


@pytest.mark.parametrize("name", SHOWN)
def test_no_other_value_at_any_place_stops_a_source(name: str) -> None:
    payload, source = loaded(name), name.partition("/")[0]
    for path in list(paths(payload))[1:]:
        for other in OTHERS:
            before = assign(payload, path, other)
            read(source, payload, headers_of(name))
            assign(payload, path, before)


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_changed_body_says_can_be_shown(name: str) -> None:
    payload = loaded(name)
    for number, path in enumerate(list(paths(payload))[1:]):
        before = assign(payload, path, OTHERS[number % len(OTHERS)])
        found = made(payload, headers_of(name))
        assign(payload, path, before)
        assert "wrong" not in found, path
        assert found["warnings"] == [], path
        assert found.get("nothing") or all(each["body"].strip() for each in found["messages"]), path


_KEYS = sorted({str(key) for name in RECORDED for path in paths(loaded(name)) for key in path if isinstance(key, str)})
_GIVEN = sorted({each for event in EVENTS.values() for each in (event, "status", "create", "fork", "wiki", "package")})


@pytest.mark.parametrize("name", NAMES)
@example(payload={}, event=" ")
@given(
    payload=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=8),
        max_leaves=25,
    ),
    event=st.sampled_from(_GIVEN) | st.text(max_size=9),
)
def test_no_json_stops_a_source(name: str, payload: Any, event: str) -> None:
    read(name, payload, {f"x-{name}-event": event})


@pytest.mark.parametrize("name", SHOWN)
def test_time_grows_with_the_body_not_its_square(name: str) -> None:
    """Each list of it long, each text long."""

    def grown(value: Any, times: int) -> Any:
        if isinstance(value, dict):
            return {key: grown(item, times) for key, item in value.items()}
        if isinstance(value, list):
            return [item for _ in range(times) for item in value]
        return value * times if isinstance(value, str) and len(value) > 20 else value

    def took(times: int) -> float:
        payload = grown(loaded(name), times)
        best = float("inf")
        for _ in range(3):
            begun = time.process_time()
            read(name.partition("/")[0], payload, headers_of(name))
            best = min(best, time.process_time() - begun)
        return best

    assert took(2_000) < 40 * max(took(200), 0.001)


def test_enormous_push_is_cut_to_what_fits() -> None:
    found = github("push", pushed(commits=commits(3_000), ref=f"refs/heads/{'b' * 100_000}"))
    assert found["warnings"] == []
    message = only(found)
    assert "3,000 commits" in message["body"]
    assert len(message["html"]) < 5_000
