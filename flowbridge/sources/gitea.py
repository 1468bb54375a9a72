"""Gitea, Forgejo and Gogs: mostly GitHub's shapes, some of their own (https://docs.gitea.com/usage/repository/webhooks)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources import github
from flowbridge.sources.github_events import checks, commits, tickets
from flowbridge.sources.github_events.common import where, who
from flowbridge.sources.reading import mapping, moment, objects, text
from flowbridge.sources.source import Headers, Incoming, Json, Nothing, Notice, Source, UnrecognisedError

_NAMES = ("x-forgejo", "x-gitea", "x-gogs")  # each repeats the headers of those after it
_ALIASES = {  # GitHub's name of the event
    **dict.fromkeys(("issue_assign", "issue_label", "issue_milestone"), "issues"),
    **dict.fromkeys(
        (
            *("pull_request_assign", "pull_request_label", "pull_request_milestone", "pull_request_sync"),
            "pull_request_review_request",
        ),
        "pull_request",
    ),
}
_REVIEWS = {
    "pull_request_review_approved": ("👍", "approved", "approved"),
    "pull_request_approved": ("👍", "approved", "approved"),
    "pull_request_review_rejected": ("✋", "requested changes to", "changes_requested"),
    "pull_request_rejected": ("✋", "requested changes to", "changes_requested"),
}


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if not isinstance(payload, dict):
        raise UnrecognisedError("is no JSON object")
    event = github.event_of(incoming, *(f"{prefix}-event" for prefix in _NAMES))
    if not event:
        raise UnrecognisedError("has no header X-Gitea-Event, and its keys do not say what has happened")
    action = hosts.name(payload, "action")
    report = _report(payload, event, action)
    if report is None:
        return github.notices(payload, _ALIASES.get(event, event))
    original = hosts.name(payload, "forkee", "full_name") if event == "fork" else ""
    place = hosts.first(original, where(payload), hosts.name(payload, "run", "repository", "full_name"))
    return [report.notice(f"{event}.{action}" if action else event, place, who(payload))]


def _report(payload: Json, event: str, action: str) -> hosts.Report | None:
    """None: it is as GitHub's."""
    if event == "push":
        return commits.push(payload, action, "compare_url")
    if event.startswith("action_run"):
        return _action_run(payload, action)
    if payload.get("review") and "pull_request" in payload:
        return _review(payload)
    event = _ALIASES.get(event, event)
    if event == "fork":  # GitHub's the other way round: `repository` is the new one
        fork = hosts.link(hosts.name(payload, "repository", "full_name"), text(payload, "repository", "html_url"))
        return hosts.Report(hosts.sentence(who(payload), "forked the repository to", fork))
    if event == "wiki":
        return _wiki(payload, action)
    if event == "package":
        return _package(payload, action)
    if event == "status":
        return _status(payload)
    if event in ("issues", "pull_request") and action in ("label_updated", "label_cleared"):
        return _labels(payload, event)
    if event == "pull_request" and action == "synchronized":
        return tickets.pull_request(payload, "synchronize")
    return None


def _labels(payload: Json, event: str) -> hosts.Report:
    is_pull = event == "pull_request"
    thing = mapping(payload, event if is_pull else "issue")
    names = [hosts.name(each, "name") for each in objects(thing, "labels")]
    said = hosts.sentence(
        who(payload),
        "changed the labels of",
        "pull request" if is_pull else "issue",
        tickets.ticket(thing),
        "to" if names else "",
        hosts.listed(names),
    )
    return hosts.Report(said, is_quiet=True)


def _review(payload: Json) -> hosts.Report:
    found = mapping(payload, "review")
    icon, verb, outcome = _REVIEWS.get(text(found, "type"), ("", "reviewed", "commented"))
    said = hosts.quote(found, "content")
    return hosts.Report(
        hosts.sentence(who(payload), verb, "pull request", tickets.ticket(mapping(payload, "pull_request"))),
        icon,
        quote=said,
        outcome=outcome,
    )


def _wiki(payload: Json, action: str) -> hosts.Report:
    page, root = hosts.line(payload, "page"), text(payload, "repository", "html_url")
    url = f"{root}/wiki/{page.replace(' ', '-')}" if root and action != "deleted" else ""
    return hosts.Report(
        hosts.sentence(who(payload), action or "edited", "the wiki page", hosts.link(page or "(untitled)", url)),
        facts=hosts.facts(hosts.sentence(hosts.line(payload, "comment"))),
    )


def _package(payload: Json, action: str) -> hosts.Report:
    found = mapping(payload, "package")
    label = " ".join(filter(None, (hosts.first(hosts.name(found, "name"), "(unnamed)"), hosts.name(found, "version"))))
    by = hosts.first(who(payload), hosts.name(found, "creator", "login"))
    kind = hosts.name(found, "type")
    return hosts.Report(
        hosts.sentence(
            by, hosts.spoken(action) or "published", kind, "package", hosts.link(label, text(found, "html_url"))
        )
    )


def _status(payload: Json) -> hosts.Report:
    report = checks.status(payload, "")
    commit = mapping(payload, "commit")
    if message := hosts.first_line(commit, "message"):
        report.facts = hosts.facts(
            hosts.sentence(hosts.line(payload, "description")),
            hosts.sentence(hosts.code(hosts.short(payload.get("sha"))), hosts.link(message, text(commit, "url"))),
        )
    return report


def _action_run(payload: Json, action: str) -> hosts.Report:
    """Forgejo's own: a run has failed, has succeeded, or has succeeded after one that failed."""
    run = mapping(payload, "run")
    is_recovered = action.startswith("recover")
    workflow, ref = (
        hosts.name(run, "workflow_id"),
        hosts.first(hosts.name(run, "prettyref"), hosts.branch(run.get("ref"))[1]),
    )
    index = text(run, "index_in_repo")[:20]
    report = hosts.checked(
        hosts.sentence(hosts.first(workflow, "A workflow"), is_recovered and "has recovered:"),
        ref,
        hosts.lasted(moment(run.get("started")), moment(run.get("stopped"))),
        hosts.link(f"run #{index}" if index else "details", text(run, "html_url")),
        "success" if is_recovered else action,
    )
    report.facts = hosts.facts(
        hosts.commit(
            hosts.short(run.get("commit_sha")), hosts.line(run, "title"), hosts.name(run, "trigger_user", "login")
        )
    )
    # Of the workflow, not of the run: it recovers from an earlier run.
    report.key = hosts.key("action_run", text(run, "repository", "full_name"), workflow, ref)
    report.firing = (text(run, "id")[:64],) if report.state == "firing" else ()
    report.time = moment(run.get("stopped")) or moment(run.get("updated"))
    return report


def _forgejo(headers: Headers, payload: Any) -> bool:
    return "x-forgejo-event" in headers


def _gitea(headers: Headers, payload: Any) -> bool:
    return "x-gitea-event" in headers or "x-gogs-event" in headers


def delivery_id(headers: Headers, payload: Any) -> str:
    return hosts.first(*(headers.get(f"{prefix}-delivery", "") for prefix in _NAMES))


SOURCE = Source(
    "gitea",
    "Gitea",
    _gitea,
    read,
    template=hosts.words,
    delivery_id=delivery_id,
    scheme="gitea",
    sample={
        **{
            key: value for key, value in github.SAMPLE.items() if key not in ("created", "deleted", "forced", "compare")
        },
        "compare_url": github.SAMPLE["compare"],
        "total_commits": 1,
    },
    sample_headers={"x-gitea-event": "push", "x-gogs-event": "push", "x-github-event": "push"},
)
FORGEJO = replace(
    SOURCE,
    name="forgejo",
    title="Forgejo",
    recognises=_forgejo,
    sample_headers={"x-forgejo-event": "push", **SOURCE.sample_headers},
)
