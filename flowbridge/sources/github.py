"""GitHub: what its webhooks report (https://docs.github.com/webhooks/webhook-events-and-payloads).

What each event says is in `github_events/`. Gitea and Forgejo have most of its shapes: `gitea.py` uses both.
"""

from collections.abc import Sequence
from typing import Any

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events import checks, comments, commits, other, releases, repositories, security, tickets
from flowbridge.sources.github_events.common import Make, where, who
from flowbridge.sources.source import Headers, Incoming, Json, Nothing, Notice, Source, UnrecognisedError

_REPORTS: dict[str, Make] = {
    **commits.REPORTS,
    **tickets.REPORTS,
    **comments.REPORTS,
    **checks.REPORTS,
    **releases.REPORTS,
    **security.REPORTS,
    **repositories.REPORTS,
}
# By keys, for a body without headers: the first whose keys are all there.
_GUESSES: dict[str, set[str]] = {
    "ping": {"zen", "hook"},
    "push": {"ref", "before", "after"},
    "pull_request_review": {"pull_request", "review"},
    "pull_request_review_comment": {"pull_request", "comment"},
    "issue_comment": {"issue", "comment"},
    "pull_request": {"pull_request", "number"},
    "issues": {"issue"},
    "discussion_comment": {"discussion", "comment"},
    "discussion": {"discussion"},
    "deployment_review": {"workflow_run", "workflow_job_run"},
    "workflow_run": {"workflow_run"},
    "workflow_job": {"workflow_job"},
    "check_run": {"check_run"},
    "check_suite": {"check_suite"},
    "deployment_status": {"deployment_status"},
    "deployment": {"deployment"},
    "release": {"release"},
    "security_advisory": {"security_advisory"},
    "commit_comment": {"comment"},
    "status": {"sha", "state", "context"},
    "create": {"ref", "ref_type", "master_branch"},
    "delete": {"ref", "ref_type"},
    "fork": {"forkee"},
    "gollum": {"pages"},
    "star": {"starred_at"},
}


def event_of(incoming: Incoming, *headers: str) -> str:
    """What has happened: a header says so. Without any, as for a preview, the keys of the body do."""
    found = hosts.first(*(incoming.headers.get(header, "").strip() for header in headers))[: hosts.MAX_NAME]
    if found or not isinstance(incoming.payload, dict):
        return found
    there = {key for key, value in incoming.payload.items() if value is not None}
    return next((event for event, keys in _GUESSES.items() if keys <= there), "")


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if not isinstance(payload, dict):
        raise UnrecognisedError("is no JSON object")
    event = event_of(incoming, "x-github-event")
    if not event:
        raise UnrecognisedError("has no header X-GitHub-Event, and its keys do not say what has happened")
    return notices(payload, event)


def notices(payload: Json, event: str) -> Sequence[Notice] | Nothing:
    if event == "ping":
        return Nothing("a ping: the hook works", "ping")
    action = hosts.name(payload, "action")
    report = _REPORTS.get(event, other.report(event))(payload, action)
    return [report.notice(f"{event}.{action}" if action else event, where(payload), who(payload))]


def recognises(headers: Headers, payload: Any) -> bool:
    return "x-github-event" in headers


def delivery_id(headers: Headers, payload: Any) -> str:
    return headers.get("x-github-delivery", "")


_SAMPLE_REPOSITORY = {"full_name": "octo-org/octo-repo", "html_url": "https://github.com/octo-org/octo-repo"}
SAMPLE: Json = {
    "ref": "refs/heads/main",
    "before": "6113728f27ae82c7b1a177c8d03f9e96e0adf246",
    "after": "ec26c3e57ca3a959ca5aad62de7213c562f8c821",
    "compare": "https://github.com/octo-org/octo-repo/compare/6113728f27ae...ec26c3e57ca3",
    "created": False,
    "deleted": False,
    "forced": False,
    "commits": [
        {
            "id": "ec26c3e57ca3a959ca5aad62de7213c562f8c821",
            "message": "Say hello to the room",
            "url": "https://github.com/octo-org/octo-repo/commit/ec26c3e57ca3a959ca5aad62de7213c562f8c821",
            "author": {"name": "Monalisa Octocat", "username": "octocat"},
        }
    ],
    "repository": _SAMPLE_REPOSITORY,
    "pusher": {"name": "octocat"},
    "sender": {"login": "octocat"},
}

SOURCE = Source(
    "github",
    "GitHub",
    recognises,
    read,
    template=hosts.words,
    delivery_id=delivery_id,
    scheme="github",
    sample=SAMPLE,
    sample_headers={"x-github-event": "push"},
)
