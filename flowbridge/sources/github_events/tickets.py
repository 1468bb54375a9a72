"""GitHub: issues, pull requests, discussions."""

from typing import Any

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import (
    Fields,
    Line,
    Report,
    code,
    count,
    fact,
    facts,
    first,
    joined,
    line,
    link,
    listed,
    name,
    number,
    quote,
    sentence,
    spoken,
)
from flowbridge.sources.github_events.common import VERBS, Make, names, who
from flowbridge.sources.reading import mapping, moment, text

# What happens to an issue all the time, and no room wants to hear: `ignore` of a hook may have it with a +.
_QUIET = frozenset(
    (
        *("edited", "labeled", "unlabeled", "milestoned", "demilestoned", "typed", "untyped", "unassigned"),
        *("pinned", "unpinned", "locked", "unlocked", "category_changed", "unanswered"),
        *("synchronize", "review_request_removed", "enqueued", "dequeued", "auto_merge_enabled", "auto_merge_disabled"),
    )
)
_OPENING = frozenset(("opened", "reopened", "created", "ready_for_review"))


def ticket(thing: Any, url: str = "") -> code_hosts.Part:
    """`#7 Its title`, which leads there, or to a comment on it."""
    found = text(thing, "number")[:20]
    title = line(thing, "title")
    label = " ".join(filter(None, (f"#{found}" if found else "", title)))
    return link(label or "(untitled)", url or text(thing, "html_url"))


def issue(payload: Fields, action: str) -> Report:
    thing = mapping(payload, "issue")
    reason = text(thing, "state_reason")
    phrase = "closed as not planned:" if reason == "not_planned" else "closed as a duplicate:"
    is_not_done = action == "closed" and reason in ("not_planned", "duplicate")
    return _tracked(payload, action, thing, "issue", phrase if is_not_done else "")


def discussion(payload: Fields, action: str) -> Report:
    thing = mapping(payload, "discussion")
    category = name(thing, "category", "name")
    if action == "category_changed":
        return _tracked(payload, action, thing, "discussion", f"moved to {category}:")
    report = _tracked(payload, action, thing, "discussion")
    if action == "answered":
        answer = mapping(payload, "answer")
        person = name(answer, "user", "login")
        chose = f"chose an answer by {person}" if person else "chose an answer"
        shown = ticket(thing, text(answer, "html_url"))
        report.headline = sentence(who(payload), chose, "in discussion", shown)
        report.quote = quote(answer, "body")
    elif action in _OPENING:
        report.facts = facts(joined(fact("Category", category), *report.facts))
    return report


def pull_request(payload: Fields, action: str) -> Report:
    thing = mapping(payload, "pull_request")
    phrase, noun = _PULLS.get(action, ""), "pull request"
    if action == "opened" and thing.get("draft") is True:
        noun = "draft pull request"
    elif action == "closed":
        phrase = "merged" if thing.get("merged") is True else "closed without merging:"
    elif action == "review_requested":
        asked = first(name(payload, "requested_reviewer", "login"), name(payload, "requested_team", "name"))
        phrase = f"asked {asked} to review" if asked else "asked for a review of"
    report = _tracked(payload, action, thing, noun, phrase)
    if action == "closed":
        report.outcome = "merged" if phrase == "merged" else "unmerged"
    if action in _OPENING or phrase == "merged":
        report.facts = facts(_branches(thing), *report.facts)
    return report


def _branches(thing: Fields) -> Line:
    base, head = name(thing, "base", "ref"), name(thing, "head", "ref")
    added, removed, files = (number(thing, key) for key in ("additions", "deletions", "changed_files"))
    size = f"(+{added:,} -{removed:,} in {count(files, 'file')})" if files else ""
    return sentence(code(head), "→", code(base), size) if base and head else []


_PULLS = {
    "ready_for_review": "marked as ready for review:",
    "converted_to_draft": "made a draft again:",
    "synchronize": "pushed to",
    "enqueued": "added to the merge queue:",
    "dequeued": "took out of the merge queue:",
    "auto_merge_enabled": "enabled auto-merge of",
    "auto_merge_disabled": "disabled auto-merge of",
    "review_request_removed": "took back a request to review",
}


def _tracked(payload: Fields, action: str, thing: Fields, noun: str, phrase: str = "") -> Report:
    """Of an issue, a pull request or a discussion: what can happen to each of them."""
    label, milestone = name(payload, "label", "name"), name(payload, "milestone", "title")
    person = first(name(payload, "assignee", "login"), name(thing, "assignee", "login"))  # the latter is Gitea's
    did: Line
    if phrase:
        did = sentence(phrase)
    elif action in ("assigned", "unassigned"):
        whom = "themselves" if person and person == who(payload) else person or "somebody"
        did = sentence(action, whom, "to" if action == "assigned" else "from")
    elif action == "labeled":
        did = sentence("added the label", code(label), "to")
    elif action == "unlabeled":
        did = sentence("removed the label", code(label), "from")
    elif action == "milestoned":
        did = sentence("added to the milestone", code(milestone), ":")
    elif action == "demilestoned":
        did = sentence(
            "removed from the milestone" if milestone else "removed from its milestone", code(milestone), ":"
        )
    elif action == "transferred":
        did = sentence(
            "transferred to", first(name(payload, "changes", "new_repository", "full_name"), "elsewhere"), ":"
        )
    elif action == "edited":
        changed = [key for key in ("title", "body", "base") if key in mapping(payload, "changes")]
        did = sentence("edited", f"the {' and '.join(changed)} of" if changed else "")
    else:
        did = sentence(first(VERBS.get(action, ""), spoken(action), "changed"))
    report = Report(
        sentence(who(payload), did, noun, ticket(thing)),
        is_quiet=action in _QUIET,
        time=moment(thing.get("updated_at")),
    )
    if action in ("opened", "created"):
        report.quote = quote(thing, "body")
    if action in _OPENING:
        labels = fact("Labels", listed(names(thing, "labels")))
        people = [
            fact("Assigned to", _people(thing, "assignees")),
            fact("Review by", _people(thing, "requested_reviewers")),
        ]
        report.facts = facts(joined(labels, *people, fact("Milestone", name(thing, "milestone", "title"))))
    return report


def _people(thing: Fields, key: str) -> str:
    return ", ".join(names(thing, key, key="login")[: code_hosts.MAX_NAMES])


def sub_issue(payload: Fields, action: str) -> Report:
    """Reported twice: of the one and of the other."""
    verb, to = ("removed", "from") if action.endswith("_removed") else ("added", "to")
    child = line(payload, "sub_issue", "title")
    return Report(
        sentence(
            who(payload),
            verb,
            f'sub-issue "{child}"' if child else "a sub-issue",
            to,
            ticket(payload.get("parent_issue")),
        ),
        is_quiet=action.startswith("parent_issue"),
    )


REPORTS: dict[str, Make] = {
    "discussion": discussion,
    "issues": issue,
    "pull_request": pull_request,
    "sub_issues": sub_issue,
}
