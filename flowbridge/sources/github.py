"""GitHub: what its webhooks report (https://docs.github.com/webhooks/webhook-events-and-payloads).

Gitea and Forgejo have most of its shapes: `gitea.py` uses what is here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import (
    Fields,
    Line,
    Report,
    branch,
    checked,
    code,
    count,
    deployed,
    ending,
    fact,
    facts,
    first,
    first_line,
    in_order,
    joined,
    lasted,
    line,
    link,
    listed,
    name,
    number,
    quote,
    sentence,
    short,
    spoken,
)
from flowbridge.sources.reading import at, items, mapping, moment, objects, text
from flowbridge.sources.source import Headers, Incoming, Json, Nothing, Notice, Source, UnrecognisedError

Make = Callable[[Fields, str], Report]

# What happens to an issue all the time, and no room wants to hear: `ignore` of a hook may have it with a +.
_QUIET = frozenset(
    (
        *("edited", "labeled", "unlabeled", "milestoned", "demilestoned", "typed", "untyped", "unassigned"),
        *("pinned", "unpinned", "locked", "unlocked", "category_changed", "unanswered"),
        *("synchronize", "review_request_removed", "enqueued", "dequeued", "auto_merge_enabled", "auto_merge_disabled"),
    )
)
# Each release is reported three or four times: as published is the one that says that people can have it.
_QUIET_RELEASES = frozenset(("created", "edited", "updated", "released", "prereleased"))
_QUIET_EVENTS = frozenset(("label", "merge_group", "project_card", "project_column", "workflow_dispatch"))
_OPENING = frozenset(("opened", "reopened", "created", "ready_for_review"))
_ACTIONS = "github-actions"  # the app whose checks are workflow jobs, which are reported, too


def event_of(incoming: Incoming, *headers: str) -> str:
    """What has happened: a header says so. Without any, as for a preview, the keys of the body do."""
    found = first(*(incoming.headers.get(header, "").strip() for header in headers))[: code_hosts.MAX_NAME]
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
    action = name(payload, "action")
    report = _REPORTS.get(event, _anything_else(event))(payload, action)
    return [report.notice(f"{event}.{action}" if action else event, where(payload), who(payload))]


def who(payload: Fields) -> str:
    """Who did it: GitHub knows logins; Gitea's systems have none."""
    return first(name(payload, "sender", "login"), name(payload, "pusher", "name"), name(payload, "pusher", "login"))


def where(payload: Fields) -> str:
    return first(
        name(payload, "repository", "full_name"),
        name(payload, "organization", "login"),
        name(payload, "organization", "username"),
        name(payload, "enterprise", "name"),
        name(payload, "installation", "account", "login"),
    )


# Commits, branches and tags.


def push(payload: Fields, action: str, compare: str = "compare") -> Report:
    kind, ref = branch(payload.get("ref"))
    url = text(payload, compare)
    if payload.get("deleted") is True or code_hosts.is_none(payload.get("after")):
        return Report(sentence(who(payload), f"deleted {kind}", code(ref)))
    found = items(payload, "commits")
    total = max(len(found), number(payload, "total_commits"))
    is_new = payload.get("created") is True or code_hosts.is_none(payload.get("before"))
    if is_new and kind == "tag":
        head = mapping(payload, "head_commit")
        return Report(sentence(who(payload), "created tag", code(ref)), items=[_commit(head, "")] if head else [])
    verb = "created branch" if is_new else "force-pushed to" if payload.get("forced") is True else "pushed to"
    said = sentence(who(payload), verb, code(ref), total and ":", total and link(count(total, "commit"), url))
    shown = [_commit(commit, who(payload)) for commit in found[: code_hosts.MAX_COMMITS] if isinstance(commit, dict)]
    return Report(said, items=shown, left=total - len(shown), left_url=url, time=_pushed_at(payload))


def _pushed_at(payload: Fields) -> int | None:
    return moment(at(payload, "repository", "pushed_at")) or moment(at(payload, "head_commit", "timestamp"))


def _commit(commit: Fields, pusher: str) -> code_hosts.Item:
    author = mapping(commit, "author")
    names = [name(author, "username"), name(author, "name")]
    return {
        "mark": short(commit.get("id")),
        "text": first_line(commit, "message") or "(no message)",
        "url": text(commit, "url"),
        "by": "" if pusher and pusher in names else first(*names),
    }


def created(payload: Fields, action: str) -> Report:
    kind = name(payload, "ref_type")
    if kind == "repository":
        return Report(sentence(who(payload), "created the repository", _repository(payload)))
    return Report(sentence(who(payload), "created", kind or "branch", code(branch(payload.get("ref"))[1])))


def deleted(payload: Fields, action: str) -> Report:
    return Report(
        sentence(who(payload), "deleted", name(payload, "ref_type") or "branch", code(branch(payload.get("ref"))[1]))
    )


def _repository(payload: Fields, key: str = "repository") -> code_hosts.Part:
    found = mapping(payload, key)
    return link(first(name(found, "full_name"), name(found, "name")), text(found, "html_url"))


# Issues, pull requests, discussions.


def ticket(thing: Any, url: str = "") -> code_hosts.Part:
    """`#7 Its title`, which leads there, or to a comment on it."""
    found = text(thing, "number")[:20]
    title = line(thing, "title")
    label = " ".join(filter(None, (f"#{found}" if found else "", title)))
    return link(label or "(untitled)", url or text(thing, "html_url"))


def _names(value: Any, *path: str, key: str = "name") -> list[str]:
    return [name(each, key) for each in objects(value, *path)]


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
        did = sentence(first(_VERBS.get(action, ""), spoken(action), "changed"))
    report = Report(
        sentence(who(payload), did, noun, ticket(thing)),
        is_quiet=action in _QUIET,
        time=moment(thing.get("updated_at")),
    )
    if action in ("opened", "created"):
        report.quote = quote(thing, "body")
    if action in _OPENING:
        labels = fact("Labels", listed(_names(thing, "labels")))
        people = [
            fact("Assigned to", _people(thing, "assignees")),
            fact("Review by", _people(thing, "requested_reviewers")),
        ]
        report.facts = facts(joined(labels, *people, fact("Milestone", name(thing, "milestone", "title"))))
    return report


def _people(thing: Fields, key: str) -> str:
    return ", ".join(_names(thing, key, key="login")[: code_hosts.MAX_NAMES])


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


# Comments and reviews.


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


# Continuous integration. Each run is a story: what runs and what is green only tells, a failure is news.


def workflow_run(payload: Fields, action: str) -> Report:
    run = mapping(payload, "workflow_run")
    outcome = text(run, "conclusion") if action == "completed" else action
    attempt = number(run, "run_attempt")
    title = first(name(run, "name"), name(payload, "workflow", "name"), "A workflow")
    lasting = lasted(_start(run), moment(run.get("updated_at"))) if action == "completed" else ""
    run_number = text(run, "run_number")[:20]
    report = checked(
        sentence(title),
        name(run, "head_branch"),
        lasting,
        link(f"run #{run_number}" if run_number else "details", text(run, "html_url")),
        outcome,
    )
    report.facts = facts(
        _head(mapping(run, "head_commit"), run, first(name(run, "triggering_actor", "login"), who(payload))),
        joined(_pulls(payload, run), fact("Attempt", str(attempt)) if attempt > 1 else []),
    )
    report.key = code_hosts.key("workflow_run", text(run, "id"))
    report.firing = (str(attempt),) if report.state == "firing" else ()  # the next attempt that fails is news
    report.time = in_order(moment(run.get("updated_at")), action == "completed")
    return report


def _pulls(payload: Fields, run: Fields) -> Line:
    home = text(payload, "repository", "html_url")
    numbers = [text(pull, "number")[:20] for pull in objects(run, "pull_requests")][: code_hosts.MAX_NAMES]
    pulls = [link(f"#{each}", f"{home}/pull/{each}") for each in numbers if each]
    return fact("Pull request" if len(pulls) == 1 else "Pull requests", *pulls)


def _start(run: Fields) -> int | None:
    return moment(run.get("run_started_at")) or moment(run.get("created_at"))


def _head(commit: Fields, run: Fields, by: str) -> Line:
    """`abc1234 Its message — its author`."""
    sha = first(short(run.get("head_sha")), short(commit.get("id")))
    said = first(first_line(commit, "message"), line(run, "display_title"))
    return code_hosts.commit(sha, said, by)


def workflow_job(payload: Fields, action: str) -> Report:
    job = mapping(payload, "workflow_job")
    workflow = name(job, "workflow_name")
    failed = [name(step, "name") for step in objects(job, "steps") if text(step, "conclusion") == "failure"]
    report = checked(
        sentence("Job", first(name(job, "name"), "(unnamed)"), workflow and f"of {workflow}"),
        name(job, "head_branch"),
        lasted(moment(job.get("started_at")), moment(job.get("completed_at"))),
        link("details", text(job, "html_url")),
        text(job, "conclusion") if action == "completed" else action,
    )
    report.facts = facts(fact("Failed step" if len(failed) == 1 else "Failed steps", listed(failed)))
    report.is_quiet = report.state != "firing"  # its run says it
    report.key = code_hosts.key("workflow_job", text(job, "id"))
    report.time = moment(job.get("completed_at")) or moment(job.get("started_at"))
    return report


def check_run(payload: Fields, action: str) -> Report:
    run = mapping(payload, "check_run")
    report = checked(
        sentence("Check", first(name(run, "name"), "(unnamed)")),
        name(run, "check_suite", "head_branch"),
        lasted(moment(run.get("started_at")), moment(run.get("completed_at"))),
        link("details", first(text(run, "html_url"), text(run, "details_url"))),
        text(run, "conclusion") if action == "completed" else action,
    )
    report.facts = facts(sentence(code(short(run.get("head_sha"))), line(run, "output", "title")))
    report.is_quiet |= action != "completed" or text(run, "app", "slug") == _ACTIONS
    report.key = code_hosts.key("check_run", text(run, "id"))
    report.time = moment(run.get("completed_at")) or moment(run.get("started_at"))
    return report


def check_suite(payload: Fields, action: str) -> Report:
    suite = mapping(payload, "check_suite")
    app = name(suite, "app", "name")
    report = checked(
        sentence("The check suite", app and f"of {app}"),
        name(suite, "head_branch"),
        "",
        link("details", ""),
        text(suite, "conclusion") if action == "completed" else action,
    )
    report.facts = facts(_head(mapping(suite, "head_commit"), suite, who(payload)))
    report.is_quiet |= action != "completed" or text(suite, "app", "slug") == _ACTIONS
    report.key = code_hosts.key("check_suite", text(suite, "id"))
    report.time = moment(suite.get("updated_at"))
    return report


def status(payload: Fields, action: str) -> Report:
    branches = _names(payload, "branches")
    commit = mapping(payload, "commit")
    report = checked(
        sentence(first(name(payload, "context"), "A status")),
        branches[0] if branches else "",
        "",
        link("details", text(payload, "target_url")),
        text(payload, "state"),
    )
    author = first(name(commit, "author", "login"), name(commit, "commit", "author", "name"))
    message = link(first_line(commit, "commit", "message"), text(commit, "html_url"))
    report.facts = facts(
        sentence(line(payload, "description")),
        code_hosts.commit(short(payload.get("sha")), message, author),
    )
    report.key = code_hosts.key("status", where(payload), text(payload, "sha"), text(payload, "context"))
    report.time = moment(payload.get("updated_at"))
    return report


def deployment(payload: Fields, action: str) -> Report:
    thing, found = mapping(payload, "deployment"), mapping(payload, "deployment_status")
    state = text(found, "state")
    end = ending(state or "in_progress")
    site = text(found, "environment_url")
    return Report(
        deployed(
            code(branch(thing.get("ref"))[1]),
            state or "in_progress",
            first(name(thing, "environment"), name(found, "environment")),
            first(name(thing, "creator", "login"), who(payload)),
            link("details", first(text(found, "log_url"), text(found, "target_url"))),
        ),
        end.icon,
        facts=facts(
            sentence(code(short(thing.get("sha"))), line(found, "description") or line(thing, "description")),
            fact("Site", link(site, site)) if state == "success" and site else [],
        ),
        outcome=state,
        is_quiet=end.is_quiet,
        key=code_hosts.key("deployment", text(thing, "id")),
        state=end.state,
        time=moment(found.get("updated_at")) or moment(found.get("created_at")) or moment(thing.get("created_at")),
    )


def deployment_review(payload: Fields, action: str) -> Report:
    run = mapping(payload, "workflow_run")
    title = first(line(run, "name"), line(run, "display_title"), "A workflow")
    environment = first(name(payload, "environment"), *_names(payload, "workflow_job_runs", key="environment"))
    verb = {"requested": "waits for approval", "approved": "was approved", "rejected": "was rejected"}
    person = who(payload) if action in ("approved", "rejected") else ""
    return Report(
        sentence(
            title,
            verb.get(action, spoken(action)),
            environment and f"to deploy to {environment}",
            person and f"by {person}",
            ":",
            link("details", text(run, "html_url")),
        ),
        {"requested": "✋", "approved": "👍", "rejected": "❌"}.get(action, ""),
        quote=quote(payload, "comment"),
    )


def page_build(payload: Fields, action: str) -> Report:
    build = mapping(payload, "build")
    state = text(build, "status")
    end = ending({"built": "success", "errored": "failure"}.get(state, state))
    verb = {"built": "were built", "errored": "could not be built"}.get(state, "are being built")
    return Report(
        sentence("The pages", verb),
        end.icon,
        facts=facts(sentence(code(short(build.get("commit"))), line(build, "error", "message"))),
        outcome=state,
        is_quiet=end.state != "firing",
        key=code_hosts.key("page_build", where(payload)),
        state=end.state,
        firing=(short(build.get("commit")),) if end.state == "firing" else (),
        time=moment(build.get("updated_at")),
    )


# Releases and packages.


def release(payload: Fields, action: str) -> Report:
    thing = mapping(payload, "release")
    tag, title = name(thing, "tag_name"), line(thing, "name")
    noun = "pre-release" if thing.get("prerelease") is True else "draft release" if thing.get("draft") else "release"
    is_told = tag in title
    return Report(
        sentence(
            who(payload),
            _VERBS.get(action) or spoken(action) or "published",
            noun,
            sentence(code(tag), ":") if tag and title and not is_told else "",
            link(first(title, tag, "(unnamed)"), text(thing, "html_url")),
        ),
        "🎉" if action == "published" else "",
        quote=quote(thing, "body", limit=code_hosts.MAX_NOTES) if action in ("published", "created") else "",
        is_quiet=action in _QUIET_RELEASES,
        time=moment(thing.get("published_at")),
    )


def package(payload: Fields, action: str) -> Report:
    found = mapping(payload, "package") or mapping(payload, "registry_package")
    version = mapping(found, "package_version")
    named = first(name(version, "container_metadata", "tag", "name"), name(version, "version"), name(version, "name"))
    named = named[:19] if named.startswith("sha256:") else named
    label = " ".join(filter(None, (first(name(found, "name"), "(unnamed)"), named)))
    kind = name(found, "package_type").lower()
    url = first(text(version, "html_url"), text(found, "html_url"))
    return Report(sentence(who(payload), spoken(action) or "published", kind, "package", link(label, url)))


# Security.


def alert(noun: str, title: Callable[[Fields], Line], event: str) -> Make:
    """Alerts are stories: open ones fire."""

    def made(payload: Fields, action: str) -> Report:
        found = mapping(payload, "alert")
        is_open, is_over = action in _OPENED, action in _OVER
        number_ = text(found, "number")[:20]
        id_ = number_ or text(found, "id")
        verb = "" if action in ("created", "create") else _VERBS.get(action) or spoken(action)
        person = first(*(name(found, key, "login") for key in ("dismissed_by", "dismisser", "resolved_by")))
        done = f"({verb} by {person})" if is_over and person and verb else f"({verb})" if verb else ""
        label = f"{noun} #{number_}" if number_ else noun
        return Report(
            sentence(label, done, ":", title(found)),
            "✅" if is_over else "⚠️",
            facts=facts(
                joined(*(fact(label, _first_of(found, paths)) for label, paths in _DETAILS.items())),
            ),
            key=code_hosts.key(event, where(payload), id_),
            state="firing" if is_open else "resolved" if is_over else "",
            is_quiet=not (is_open or is_over),
            time=moment(found.get("updated_at")) or moment(found.get("fixed_at")) or moment(found.get("created_at")),
        )

    return made


def _first_of(found: Fields, paths: Sequence[Sequence[str]]) -> str:
    return first(*(name(found, *path) for path in paths))


_OPENED = frozenset(("created", "create", "reopened", "reopened_by_user", "reintroduced", "auto_reopened"))
_OVER = frozenset(
    ("fixed", "resolved", "resolve", "dismissed", "dismiss", "closed_by_user", "auto_dismissed", "revoked")
)
_DETAILS = {
    "Severity": (("security_advisory", "severity"), ("rule", "severity"), ("severity",)),
    "Package": (("dependency", "package", "name"), ("affected_package_name",)),
    "File": (("dependency", "manifest_path"), ("most_recent_instance", "location", "path")),
    "Fixed in": (("security_vulnerability", "first_patched_version", "identifier"), ("fixed_in",)),
    "Reason": (("dismissed_reason",), ("dismiss_reason",), ("resolution",)),
}


def _dependabot(found: Fields) -> Line:
    advisory = mapping(found, "security_advisory")
    id_ = first(name(advisory, "cve_id"), name(advisory, "ghsa_id"))
    return sentence(id_, link(first(line(advisory, "summary"), "a vulnerable dependency"), text(found, "html_url")))


def _scanning(found: Fields) -> Line:
    tool = name(found, "tool", "name")
    what = first(line(found, "rule", "description"), name(found, "rule", "id"), "a finding")
    return sentence(tool and f"{tool} says", link(what, text(found, "html_url")))


def _secret(found: Fields) -> Line:
    kind = first(name(found, "secret_type_display_name"), spoken(name(found, "secret_type")), "a secret")
    return sentence(link(kind, text(found, "html_url")))


def _vulnerability(found: Fields) -> Line:
    id_ = first(name(found, "external_identifier"), name(found, "ghsa_id"), "a vulnerability")
    return sentence(link(id_, text(found, "external_reference")))


def advisory(payload: Fields, action: str) -> Report:
    """Of GitHub's database, or of this repository."""
    found = mapping(payload, "security_advisory") or mapping(payload, "repository_advisory")
    ghsa = name(found, "ghsa_id")
    url = first(text(found, "html_url"), f"https://github.com/advisories/{ghsa}" if ghsa else "")
    packages = list(dict.fromkeys(name(each, "package", "name") for each in objects(found, "vulnerabilities")))
    fixes = dict.fromkeys(
        first(name(each, "first_patched_version", "identifier"), name(each, "patched_versions"))
        for each in objects(found, "vulnerabilities")
    )
    return Report(
        sentence(
            f"Security advisory {spoken(action) or 'changed'}:",
            link(first(line(found, "summary"), ghsa, "(untitled)"), url),
        ),
        "⚠️" if action in ("published", "reported") else "",
        facts=facts(
            joined(
                fact("Severity", name(found, "severity")),
                fact("Packages" if len(packages) > 1 else "Package", listed(packages)),
                fact("Fixed in", ", ".join([fix for fix in fixes if fix][: code_hosts.MAX_NAMES])),
            ),
            fact("Known as", ", ".join(filter(None, (ghsa, name(found, "cve_id"))))),
        ),
        quote=quote(found, "description") if action in ("published", "reported") else "",
        is_quiet=action == "updated",
        time=moment(found.get("updated_at")),
    )


# What else happens to a repository.


def star(payload: Fields, action: str) -> Report:
    stars = number(payload, "repository", "stargazers_count")
    if action == "deleted":
        return Report(sentence(who(payload), "took back a star"), is_quiet=True)
    return Report(sentence(who(payload), "starred the repository", stars and f"({count(stars, 'star')})"), "⭐")


def watch(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "watches the repository"), "👀")


def fork(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "forked the repository to", _repository(payload, "forkee")))


def public(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "made the repository public:", _repository(payload)))


def repository(payload: Fields, action: str) -> Report:
    verb = {"publicized": "made public", "privatized": "made private"}.get(action, spoken(action) or "changed")
    old = first(
        name(payload, "changes", "repository", "name", "from"),
        name(payload, "changes", "owner", "from", "user", "login"),
        name(payload, "changes", "owner", "from", "organization", "login"),
    )
    kind, _, rest = verb.partition(" ")
    said = sentence(
        who(payload), kind, "the repository", rest, old and f"from {old}", (rest or old) and ":", _repository(payload)
    )
    return Report(said, is_quiet=action == "edited")


def gollum(payload: Fields, action: str) -> Report:
    pages = list(objects(payload, "pages"))
    shown: list[code_hosts.Item] = [
        {
            "mark": "",
            "text": f"{first(line(page, 'title'), '(untitled)')} ({name(page, 'action') or 'edited'})",
            "url": text(page, "html_url"),
            "by": "",
        }
        for page in pages[: code_hosts.MAX_COMMITS]
    ]
    if len(pages) == 1:
        verb = name(pages[0], "action") or "edited"
        page = link(first(line(pages[0], "title"), "(untitled)"), text(pages[0], "html_url"))
        return Report(sentence(who(payload), verb, "the wiki page", page), quote=quote(pages[0], "summary"))
    return Report(
        sentence(who(payload), "changed", count(len(pages), "page"), "of the wiki"),
        items=shown,
        left=max(0, len(pages) - len(shown)),
    )


def member(payload: Fields, action: str) -> Report:
    person = first(name(payload, "member", "login"), "somebody")
    if action in ("added", "removed"):
        to = "to" if action == "added" else "from"
        return Report(sentence(who(payload), action, person, to, "the collaborators"))
    return Report(sentence(who(payload), "changed the permissions of", person))


def membership(payload: Fields, action: str) -> Report:
    person = first(name(payload, "member", "login"), "somebody")
    to = "from" if action == "removed" else "to"
    return Report(sentence(who(payload), action or "added", person, to, "the team", _team(payload)))


def team(payload: Fields, action: str) -> Report:
    if action in ("added_to_repository", "removed_from_repository", ""):
        did = "removed from" if action.startswith("removed") else "added to"
        return Report(sentence(who(payload), did, "the repository:", "team", _team(payload)))
    return Report(sentence(who(payload), spoken(action), "the team", _team(payload)))


def _team(payload: Fields) -> code_hosts.Part:
    return link(first(name(payload, "team", "name"), "(deleted)"), text(payload, "team", "html_url"))


def organization(payload: Fields, action: str) -> Report:
    person = first(
        name(payload, "membership", "user", "login"),
        name(payload, "invitation", "login"),
        name(payload, "user", "login"),
    )
    verbs = {"member_added": "added", "member_removed": "removed", "member_invited": "invited"}
    if action in verbs:
        to = "from" if action == "member_removed" else "to"
        return Report(sentence(who(payload), verbs[action], person or "somebody", to, "the organization"))
    old = name(payload, "changes", "login", "from")
    return Report(sentence(who(payload), spoken(action) or "changed", "the organization", old and f"(from {old})"))


def org_block(payload: Fields, action: str) -> Report:
    person = link(first(name(payload, "blocked_user", "login"), "somebody"), text(payload, "blocked_user", "html_url"))
    return Report(sentence(who(payload), action or "blocked", person))


def installation(payload: Fields, action: str) -> Report:
    verbs = {
        "created": "installed",
        "deleted": "uninstalled",
        "suspend": "suspended",
        "unsuspend": "resumed",
        "new_permissions_accepted": "accepted new permissions of",
    }
    return Report(
        sentence(who(payload), verbs.get(action, spoken(action)), _app(payload)),
        facts=facts(fact("Repositories", listed(_names(payload, "repositories", key="full_name")))),
    )


def installation_repositories(payload: Fields, action: str) -> Report:
    added = _names(payload, "repositories_added", key="full_name")
    removed = _names(payload, "repositories_removed", key="full_name")
    return Report(
        sentence(who(payload), "changed the repositories of", _app(payload)),
        facts=facts(fact("Added", listed(added)), fact("Removed", listed(removed))),
    )


def _app(payload: Fields) -> code_hosts.Part:
    slug = name(payload, "installation", "app_slug")
    return link(f"the app {slug}" if slug else "an app", text(payload, "installation", "html_url"))


def authorization(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "took back the authorization of this app"))


def meta(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "deleted this webhook: nothing more will come from it"))


def purchase(payload: Fields, action: str) -> Report:
    found = mapping(payload, "marketplace_purchase")
    buyer, plan = name(found, "account", "login"), name(found, "plan", "name")
    return Report(sentence(buyer or who(payload), spoken(action), "the Marketplace plan", code(plan)))


def sponsorship(payload: Fields, action: str) -> Report:
    found = mapping(payload, "sponsorship")
    sponsor = first(name(found, "sponsor", "login"), who(payload))
    tier = name(found, "tier", "name")
    verb = {
        "created": "sponsors",
        "cancelled": "no longer sponsors",
        "tier_changed": "changed the tier of sponsoring",
        "pending_tier_change": "will change the tier of sponsoring",
        "pending_cancellation": "will no longer sponsor",
    }.get(action, "changed sponsoring")
    return Report(sentence(sponsor, verb, name(found, "sponsorable", "login"), tier and f"({tier})"), "💖")


def dispatch(payload: Fields, action: str) -> Report:
    kind = first(action, name(payload, "workflow").rpartition("/")[2], "a workflow")
    ref = branch(first(text(payload, "ref"), text(payload, "branch")))[1]
    return Report(sentence(who(payload), "triggered", code(kind), ref and "on", code(ref)), is_quiet=True)


def repository_import(payload: Fields, action: str) -> Report:
    outcome = name(payload, "status")
    return Report(sentence("The import of the repository:", outcome or "done"), ending(outcome).icon)


def projects_item(payload: Fields, action: str) -> Report:
    kind = name(payload, "projects_v2_item", "content_type")
    noun = {"Issue": "an issue", "PullRequest": "a pull request", "DraftIssue": "a draft"}.get(kind, "an item")
    verb, place = {
        "created": ("added", "to a project"),
        "deleted": ("removed", "from a project"),
        "archived": ("archived", "in a project"),
        "restored": ("restored", "in a project"),
        "converted": ("converted", "of a project into an issue"),
        "edited": ("changed", "in a project"),
        "reordered": ("moved", "in a project"),
    }.get(action, (spoken(action), "in a project"))
    return Report(sentence(who(payload), verb, noun, place), is_quiet=action in ("edited", "reordered"))


# Anything else.


_THINGS = {  # event → what it is called, and where it is; its name is found
    "branch_protection_rule": ("branch protection rule", "rule"),
    "deploy_key": ("deploy key", "key"),
    "registry_package": ("package", "registry_package"),
    "projects_v2": ("project", "projects_v2"),
    "repository_ruleset": ("ruleset", "repository_ruleset"),
}
_VERBS = {
    "create": "created",
    "started": "started",
    "suspend": "suspended",
    "dismiss": "dismissed",
    "resolve": "resolved",
    "closed_by_user": "closed",
    "reopened_by_user": "reopened",
    "auto_dismissed": "dismissed automatically",
    "auto_reopened": "reopened automatically",
    "updated": "edited",
    "unpublished": "withdrew",
    "labeled": "labelled",
    "unlabeled": "took a label off",
}


def _anything_else(event: str) -> Make:
    noun, key = _THINGS.get(event, (spoken(event), event))

    def made(payload: Fields, action: str) -> Report:
        thing = mapping(payload, key)
        title = first(*(line(thing, each) for each in ("title", "name", "login", "full_name", "note", "slug")))
        said = link(title, text(thing, "html_url")) if title else None
        verb = _VERBS.get(action, spoken(action))
        past = verb.partition(" ")[0].endswith("ed")
        by = who(payload)
        if by and past:
            known = sentence(by, verb, "the" if title else _article(noun), noun, said)
        elif by:
            known = sentence(f"{by}:", noun, said, verb)
        else:
            known = sentence(noun[:1].upper() + noun[1:], said, past and "was", verb)
        return Report(known, is_quiet=event in _QUIET_EVENTS)

    return made


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


_REPORTS: dict[str, Make] = {
    "check_run": check_run,
    "check_suite": check_suite,
    "code_scanning_alert": alert("Code scanning alert", _scanning, "code_scanning_alert"),
    "commit_comment": commit_comment,
    "create": created,
    "delete": deleted,
    "dependabot_alert": alert("Dependabot alert", _dependabot, "dependabot_alert"),
    "deployment": deployment,
    "deployment_review": deployment_review,
    "deployment_status": deployment,
    "discussion": discussion,
    "discussion_comment": discussion_comment,
    "fork": fork,
    "github_app_authorization": authorization,
    "gollum": gollum,
    "installation": installation,
    "installation_repositories": installation_repositories,
    "issue_comment": issue_comment,
    "issues": issue,
    "marketplace_purchase": purchase,
    "member": member,
    "membership": membership,
    "meta": meta,
    "organization": organization,
    "org_block": org_block,
    "package": package,
    "page_build": page_build,
    "projects_v2_item": projects_item,
    "public": public,
    "pull_request": pull_request,
    "pull_request_review": review,
    "pull_request_review_comment": review_comment,
    "pull_request_review_thread": review_thread,
    "push": push,
    "registry_package": package,
    "release": release,
    "repository": repository,
    "repository_advisory": advisory,
    "repository_dispatch": dispatch,
    "repository_import": repository_import,
    "repository_vulnerability_alert": alert("Vulnerability alert", _vulnerability, "repository_vulnerability_alert"),
    "secret_scanning_alert": alert("Secret scanning alert", _secret, "secret_scanning_alert"),
    "security_advisory": advisory,
    "sponsorship": sponsorship,
    "star": star,
    "status": status,
    "sub_issues": sub_issue,
    "team": team,
    "team_add": team,
    "watch": watch,
    "workflow_dispatch": dispatch,
    "workflow_job": workflow_job,
    "workflow_run": workflow_run,
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
    template=code_hosts.words,
    delivery_id=delivery_id,
    scheme="github",
    sample=SAMPLE,
    sample_headers={"x-github-event": "push"},
)
