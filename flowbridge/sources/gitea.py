"""Gitea, Forgejo and Gogs: mostly GitHub's shapes, some of their own (https://docs.gitea.com/usage/repository/webhooks)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowbridge.sources import code_hosts, github
from flowbridge.sources.code_hosts import (
    Report,
    branch,
    checked,
    code,
    facts,
    first,
    lasted,
    line,
    link,
    name,
    quote,
    sentence,
    short,
    spoken,
)
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
    action = name(payload, "action")
    report = _report(payload, event, action)
    if report is None:
        return github.notices(payload, _ALIASES.get(event, event))
    original = name(payload, "forkee", "full_name") if event == "fork" else ""
    place = first(original, where(payload), name(payload, "run", "repository", "full_name"))
    return [report.notice(f"{event}.{action}" if action else event, place, who(payload))]


def _report(payload: Json, event: str, action: str) -> Report | None:
    """None: it is as GitHub's."""
    if event == "push":
        return commits.push(payload, action, "compare_url")
    if event.startswith("action_run"):
        return _action_run(payload, action)
    if payload.get("review") and "pull_request" in payload:
        return _review(payload)
    event = _ALIASES.get(event, event)
    if event == "fork":  # GitHub's the other way round: `repository` is the new one
        fork = link(name(payload, "repository", "full_name"), text(payload, "repository", "html_url"))
        return Report(sentence(who(payload), "forked the repository to", fork))
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


def _labels(payload: Json, event: str) -> Report:
    is_pull = event == "pull_request"
    thing = mapping(payload, event if is_pull else "issue")
    names = [name(each, "name") for each in objects(thing, "labels")]
    said = sentence(
        who(payload),
        "changed the labels of",
        "pull request" if is_pull else "issue",
        tickets.ticket(thing),
        "to" if names else "",
        code_hosts.listed(names),
    )
    return Report(said, is_quiet=True)


def _review(payload: Json) -> Report:
    found = mapping(payload, "review")
    icon, verb, outcome = _REVIEWS.get(text(found, "type"), ("", "reviewed", "commented"))
    said = quote(found, "content")
    return Report(
        sentence(who(payload), verb, "pull request", tickets.ticket(mapping(payload, "pull_request"))),
        icon,
        quote=said,
        outcome=outcome,
    )


def _wiki(payload: Json, action: str) -> Report:
    page, root = line(payload, "page"), text(payload, "repository", "html_url")
    url = f"{root}/wiki/{page.replace(' ', '-')}" if root and action != "deleted" else ""
    return Report(
        sentence(who(payload), action or "edited", "the wiki page", link(page or "(untitled)", url)),
        facts=facts(sentence(line(payload, "comment"))),
    )


def _package(payload: Json, action: str) -> Report:
    found = mapping(payload, "package")
    label = " ".join(filter(None, (first(name(found, "name"), "(unnamed)"), name(found, "version"))))
    by = first(who(payload), name(found, "creator", "login"))
    kind = name(found, "type")
    return Report(sentence(by, spoken(action) or "published", kind, "package", link(label, text(found, "html_url"))))


def _status(payload: Json) -> Report:
    report = checks.status(payload, "")
    commit = mapping(payload, "commit")
    if message := code_hosts.first_line(commit, "message"):
        report.facts = facts(
            sentence(line(payload, "description")),
            sentence(code(short(payload.get("sha"))), link(message, text(commit, "url"))),
        )
    return report


def _action_run(payload: Json, action: str) -> Report:
    """Forgejo's own: a run has failed, has succeeded, or has succeeded after one that failed."""
    run = mapping(payload, "run")
    is_recovered = action.startswith("recover")
    workflow, ref = name(run, "workflow_id"), first(name(run, "prettyref"), branch(run.get("ref"))[1])
    index = text(run, "index_in_repo")[:20]
    report = checked(
        sentence(first(workflow, "A workflow"), is_recovered and "has recovered:"),
        ref,
        lasted(moment(run.get("started")), moment(run.get("stopped"))),
        link(f"run #{index}" if index else "details", text(run, "html_url")),
        "success" if is_recovered else action,
    )
    report.facts = facts(
        code_hosts.commit(short(run.get("commit_sha")), line(run, "title"), name(run, "trigger_user", "login"))
    )
    # Of the workflow, not of the run: it recovers from an earlier run.
    report.key = code_hosts.key("action_run", text(run, "repository", "full_name"), workflow, ref)
    report.firing = (text(run, "id")[:64],) if report.state == "firing" else ()
    report.time = moment(run.get("stopped")) or moment(run.get("updated"))
    return report


def _forgejo(headers: Headers, payload: Any) -> bool:
    return "x-forgejo-event" in headers


def _gitea(headers: Headers, payload: Any) -> bool:
    return "x-gitea-event" in headers or "x-gogs-event" in headers


def delivery_id(headers: Headers, payload: Any) -> str:
    return first(*(headers.get(f"{prefix}-delivery", "") for prefix in _NAMES))


SOURCE = Source(
    "gitea",
    "Gitea",
    _gitea,
    read,
    template=code_hosts.words,
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
