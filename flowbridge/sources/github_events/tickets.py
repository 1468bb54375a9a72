"""GitHub: issues, pull requests, discussions."""

from typing import Any

from flowbridge.sources import code_hosts as hosts
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


def ticket(thing: Any, url: str = "") -> hosts.Part:
    """`#7 Its title`, which leads there, or to a comment on it."""
    found = text(thing, "number")[:20]
    title = hosts.line(thing, "title")
    label = " ".join(filter(None, (f"#{found}" if found else "", title)))
    return hosts.link(label or "(untitled)", url or text(thing, "html_url"))


def issue(payload: hosts.Fields, action: str) -> hosts.Report:
    thing = mapping(payload, "issue")
    reason = text(thing, "state_reason")
    phrase = "closed as not planned:" if reason == "not_planned" else "closed as a duplicate:"
    is_not_done = action == "closed" and reason in ("not_planned", "duplicate")
    return _tracked(payload, action, thing, "issue", phrase if is_not_done else "")


def discussion(payload: hosts.Fields, action: str) -> hosts.Report:
    thing = mapping(payload, "discussion")
    category = hosts.name(thing, "category", "name")
    if action == "category_changed":
        return _tracked(payload, action, thing, "discussion", f"moved to {category}:")
    report = _tracked(payload, action, thing, "discussion")
    if action == "answered":
        answer = mapping(payload, "answer")
        person = hosts.name(answer, "user", "login")
        chose = f"chose an answer by {person}" if person else "chose an answer"
        shown = ticket(thing, text(answer, "html_url"))
        report.headline = hosts.sentence(who(payload), chose, "in discussion", shown)
        report.quote = hosts.quote(answer, "body")
    elif action in _OPENING:
        report.facts = hosts.facts(hosts.joined(hosts.fact("Category", category), *report.facts))
    return report


def pull_request(payload: hosts.Fields, action: str) -> hosts.Report:
    thing = mapping(payload, "pull_request")
    phrase, noun = _PULLS.get(action, ""), "pull request"
    if action == "opened" and thing.get("draft") is True:
        noun = "draft pull request"
    elif action == "closed":
        phrase = "merged" if thing.get("merged") is True else "closed without merging:"
    elif action == "review_requested":
        asked = hosts.first(
            hosts.name(payload, "requested_reviewer", "login"), hosts.name(payload, "requested_team", "name")
        )
        phrase = f"asked {asked} to review" if asked else "asked for a review of"
    report = _tracked(payload, action, thing, noun, phrase)
    if action == "closed":
        report.outcome = "merged" if phrase == "merged" else "unmerged"
    if action in _OPENING or phrase == "merged":
        report.facts = hosts.facts(_branches(thing), *report.facts)
    return report


def _branches(thing: hosts.Fields) -> hosts.Line:
    base, head = hosts.name(thing, "base", "ref"), hosts.name(thing, "head", "ref")
    added, removed, files = (hosts.number(thing, key) for key in ("additions", "deletions", "changed_files"))
    size = f"(+{added:,} -{removed:,} in {hosts.count(files, 'file')})" if files else ""
    return hosts.sentence(hosts.code(head), "→", hosts.code(base), size) if base and head else []


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


def _tracked(payload: hosts.Fields, action: str, thing: hosts.Fields, noun: str, phrase: str = "") -> hosts.Report:
    """Of an issue, a pull request or a discussion: what can happen to each of them."""
    label, milestone = hosts.name(payload, "label", "name"), hosts.name(payload, "milestone", "title")
    person = hosts.first(
        hosts.name(payload, "assignee", "login"), hosts.name(thing, "assignee", "login")
    )  # the latter is Gitea's
    did: hosts.Line
    if phrase:
        did = hosts.sentence(phrase)
    elif action in ("assigned", "unassigned"):
        whom = "themselves" if person and person == who(payload) else person or "somebody"
        did = hosts.sentence(action, whom, "to" if action == "assigned" else "from")
    elif action == "labeled":
        did = hosts.sentence("added the label", hosts.code(label), "to")
    elif action == "unlabeled":
        did = hosts.sentence("removed the label", hosts.code(label), "from")
    elif action == "milestoned":
        did = hosts.sentence("added to the milestone", hosts.code(milestone), ":")
    elif action == "demilestoned":
        did = hosts.sentence(
            "removed from the milestone" if milestone else "removed from its milestone", hosts.code(milestone), ":"
        )
    elif action == "transferred":
        did = hosts.sentence(
            "transferred to",
            hosts.first(hosts.name(payload, "changes", "new_repository", "full_name"), "elsewhere"),
            ":",
        )
    elif action == "edited":
        changed = [key for key in ("title", "body", "base") if key in mapping(payload, "changes")]
        did = hosts.sentence("edited", f"the {' and '.join(changed)} of" if changed else "")
    else:
        did = hosts.sentence(hosts.first(VERBS.get(action, ""), hosts.spoken(action), "changed"))
    report = hosts.Report(
        hosts.sentence(who(payload), did, noun, ticket(thing)),
        is_quiet=action in _QUIET,
        time=moment(thing.get("updated_at")),
    )
    if action in ("opened", "created"):
        report.quote = hosts.quote(thing, "body")
    if action in _OPENING:
        labels = hosts.fact("Labels", hosts.listed(names(thing, "labels")))
        people = [
            hosts.fact("Assigned to", _people(thing, "assignees")),
            hosts.fact("Review by", _people(thing, "requested_reviewers")),
        ]
        report.facts = hosts.facts(
            hosts.joined(labels, *people, hosts.fact("Milestone", hosts.name(thing, "milestone", "title")))
        )
    return report


def _people(thing: hosts.Fields, key: str) -> str:
    return ", ".join(names(thing, key, key="login")[: hosts.MAX_NAMES])


def sub_issue(payload: hosts.Fields, action: str) -> hosts.Report:
    """Reported twice: of the one and of the other."""
    verb, to = ("removed", "from") if action.endswith("_removed") else ("added", "to")
    child = hosts.line(payload, "sub_issue", "title")
    return hosts.Report(
        hosts.sentence(
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
