"""GitHub: comments and reviews."""

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import Make, who
from flowbridge.sources.github_events.tickets import ticket
from flowbridge.sources.reading import mapping, moment, text


def issue_comment(payload: hosts.Fields, action: str) -> hosts.Report:
    thing = mapping(payload, "issue")
    is_pull = bool(thing.get("pull_request")) or payload.get("is_pull") is True
    return comment(payload, action, hosts.sentence("pull request" if is_pull else "issue"), thing)


def comment(payload: hosts.Fields, action: str, noun: hosts.Line, thing: hosts.Fields) -> hosts.Report:
    found = mapping(payload, "comment")
    how = {"created": "commented on", "edited": "edited a comment on", "deleted": "deleted a comment on"}
    url = "" if action == "deleted" else text(found, "html_url")
    file = hosts.name(found, "path")
    place = (
        hosts.fact("File", hosts.code(file), hosts.number(found, "line") and f"line {hosts.number(found, 'line')}")
        if file
        else []
    )
    return hosts.Report(
        hosts.sentence(
            who(payload), how.get(action, f"{hosts.spoken(action) or 'changed'} a comment on"), noun, ticket(thing, url)
        ),
        facts=hosts.facts(place) if action != "deleted" else [],
        quote=hosts.quote(found, "body") if action != "deleted" else "",
        is_quiet=action in ("edited", "deleted", "pinned", "unpinned"),
        time=moment(found.get("updated_at")),
    )


def commit_comment(payload: hosts.Fields, action: str) -> hosts.Report:
    found = mapping(payload, "comment")
    commit = hosts.first(hosts.short(found.get("commit_id")), "a commit")
    file = hosts.name(found, "path")
    return hosts.Report(
        hosts.sentence(who(payload), "commented on commit", hosts.link(commit, text(found, "html_url"))),
        facts=hosts.facts(hosts.fact("File", hosts.code(file))),
        quote=hosts.quote(found, "body"),
    )


def review(payload: hosts.Fields, action: str) -> hosts.Report:
    found, thing = mapping(payload, "review"), mapping(payload, "pull_request")
    state = text(found, "state").lower()
    pull = ticket(thing, text(found, "html_url"))
    said = hosts.quote(found, "body")
    if action == "dismissed":
        by = hosts.name(found, "user", "login")
        return hosts.Report(
            hosts.sentence(who(payload), "dismissed the review", by and f"by {by}", "of pull request", pull)
        )
    icon, verb = {"approved": ("👍", "approved"), "changes_requested": ("✋", "requested changes to")}.get(
        state, ("", "reviewed")
    )
    return hosts.Report(
        hosts.sentence(who(payload), verb, "pull request", pull),
        icon,
        quote=said,
        outcome=state,
        # A review that only holds comments: each of them is an event of its own.
        is_quiet=action == "edited" or (verb == "reviewed" and not said),
        time=moment(found.get("submitted_at")),
    )


def review_comment(payload: hosts.Fields, action: str) -> hosts.Report:
    return comment(payload, action, hosts.sentence("pull request"), mapping(payload, "pull_request"))


def review_thread(payload: hosts.Fields, action: str) -> hosts.Report:
    verb = "resolved" if action == "resolved" else "reopened"
    thing = mapping(payload, "pull_request")
    return hosts.Report(
        hosts.sentence(who(payload), verb, "a conversation on pull request", ticket(thing)), is_quiet=True
    )


def discussion_comment(payload: hosts.Fields, action: str) -> hosts.Report:
    return comment(payload, action, hosts.sentence("discussion"), mapping(payload, "discussion"))


REPORTS: dict[str, Make] = {
    "commit_comment": commit_comment,
    "discussion_comment": discussion_comment,
    "issue_comment": issue_comment,
    "pull_request_review": review,
    "pull_request_review_comment": review_comment,
    "pull_request_review_thread": review_thread,
}
