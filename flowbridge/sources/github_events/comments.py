"""GitHub: comments and reviews."""

from flowbridge.sources.code_hosts import (
    Fields,
    Line,
    Report,
    code,
    fact,
    facts,
    first,
    link,
    name,
    number,
    quote,
    sentence,
    short,
    spoken,
)
from flowbridge.sources.github_events.common import Make, who
from flowbridge.sources.github_events.tickets import ticket
from flowbridge.sources.reading import mapping, moment, text


def issue_comment(payload: Fields, action: str) -> Report:
    thing = mapping(payload, "issue")
    is_pull = bool(thing.get("pull_request")) or payload.get("is_pull") is True
    return comment(payload, action, sentence("pull request" if is_pull else "issue"), thing)


def comment(payload: Fields, action: str, noun: Line, thing: Fields) -> Report:
    found = mapping(payload, "comment")
    how = {"created": "commented on", "edited": "edited a comment on", "deleted": "deleted a comment on"}
    url = "" if action == "deleted" else text(found, "html_url")
    file = name(found, "path")
    place = fact("File", code(file), number(found, "line") and f"line {number(found, 'line')}") if file else []
    return Report(
        sentence(
            who(payload), how.get(action, f"{spoken(action) or 'changed'} a comment on"), noun, ticket(thing, url)
        ),
        facts=facts(place) if action != "deleted" else [],
        quote=quote(found, "body") if action != "deleted" else "",
        is_quiet=action in ("edited", "deleted", "pinned", "unpinned"),
        time=moment(found.get("updated_at")),
    )


def commit_comment(payload: Fields, action: str) -> Report:
    found = mapping(payload, "comment")
    commit = first(short(found.get("commit_id")), "a commit")
    file = name(found, "path")
    return Report(
        sentence(who(payload), "commented on commit", link(commit, text(found, "html_url"))),
        facts=facts(fact("File", code(file))),
        quote=quote(found, "body"),
    )


def review(payload: Fields, action: str) -> Report:
    found, thing = mapping(payload, "review"), mapping(payload, "pull_request")
    state = text(found, "state").lower()
    pull = ticket(thing, text(found, "html_url"))
    said = quote(found, "body")
    if action == "dismissed":
        by = name(found, "user", "login")
        return Report(sentence(who(payload), "dismissed the review", by and f"by {by}", "of pull request", pull))
    icon, verb = {"approved": ("👍", "approved"), "changes_requested": ("✋", "requested changes to")}.get(
        state, ("", "reviewed")
    )
    return Report(
        sentence(who(payload), verb, "pull request", pull),
        icon,
        quote=said,
        outcome=state,
        # A review that only holds comments: each of them is an event of its own.
        is_quiet=action == "edited" or (verb == "reviewed" and not said),
        time=moment(found.get("submitted_at")),
    )


def review_comment(payload: Fields, action: str) -> Report:
    return comment(payload, action, sentence("pull request"), mapping(payload, "pull_request"))


def review_thread(payload: Fields, action: str) -> Report:
    verb = "resolved" if action == "resolved" else "reopened"
    thing = mapping(payload, "pull_request")
    return Report(sentence(who(payload), verb, "a conversation on pull request", ticket(thing)), is_quiet=True)


def discussion_comment(payload: Fields, action: str) -> Report:
    return comment(payload, action, sentence("discussion"), mapping(payload, "discussion"))


REPORTS: dict[str, Make] = {
    "commit_comment": commit_comment,
    "discussion_comment": discussion_comment,
    "issue_comment": issue_comment,
    "pull_request_review": review,
    "pull_request_review_comment": review_comment,
    "pull_request_review_thread": review_thread,
}
