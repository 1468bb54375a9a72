"""GitLab: what its webhooks report (https://docs.gitlab.com/user/project/integrations/webhook_events)."""

from collections.abc import Callable, Sequence
from typing import Any

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.reading import items, mapping, moment, objects, text
from flowbridge.sources.source import Headers, Incoming, Json, Nothing, Notice, Source, UnrecognisedError

Make = Callable[[Json, str], hosts.Report]

_VERBS = {
    "open": "opened",
    "close": "closed",
    "reopen": "reopened",
    "update": "edited",
    "merge": "merged",
    "approved": "approved",
    "approval": "approved",
    "unapproved": "took back the approval of",
    "unapproval": "took back the approval of",
    "create": "created",
    "delete": "deleted",
    "award": "reacted with",
    "revoke": "took back the reaction",
    "destroy": "destroyed",
    "rename": "renamed",
    "transfer": "transferred",
}
_UNMERGED = frozenset(("approved", "approval"))


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if not isinstance(payload, dict):
        raise UnrecognisedError("is no JSON object")
    event = hosts.first(
        hosts.name(payload, "object_kind"), hosts.name(payload, "event_name"), _of_header(incoming.headers)
    )
    if not event:
        raise UnrecognisedError("has neither `object_kind` nor `event_name`")
    action = _action(payload, event)
    report = _REPORTS.get(event, _anything_else(event))(payload, action)
    return [report.notice(f"{event}.{action}" if action else event, where(payload), who(payload))]


def _of_header(headers: Headers) -> str:
    """`Merge Request Hook` → `merge_request`"""
    found = headers.get("x-gitlab-event", "")[: hosts.MAX_NAME]
    return found.removesuffix(" Hook").strip().lower().replace(" ", "_")


def _action(payload: Json, event: str) -> str:
    if event == "pipeline":
        return hosts.name(payload, "object_attributes", "status")
    if event in ("build", "job"):
        return hosts.name(payload, f"{event}_status")
    if event == "deployment":
        return hosts.name(payload, "status")
    found = hosts.first(
        hosts.name(payload, "object_attributes", "action"),
        hosts.name(payload, "action"),
        hosts.name(payload, "event_type"),
    )
    return "" if found == event else found


def who(payload: Json) -> str:
    return hosts.first(
        hosts.name(payload, "user", "name"),
        hosts.name(payload, "user", "username"),
        hosts.name(payload, "user_name"),
        hosts.name(payload, "user_username"),
    )


def where(payload: Json) -> str:
    project = mapping(payload, "project") or mapping(payload, "object_attributes", "target")
    return hosts.first(
        hosts.name(project, "path_with_namespace"),
        hosts.name(payload, "project_path_with_namespace"),
        hosts.name(payload, "path_with_namespace"),
        hosts.name(payload, "project_path"),
        hosts.name(payload, "group", "group_path"),
        hosts.name(payload, "group_path"),
        hosts.name(payload, "project_name"),
        hosts.name(project, "name"),
        hosts.name(payload, "group_name"),
    )


def _web(payload: Json) -> str:
    return hosts.first(text(payload, "project", "web_url"), text(payload, "repository", "homepage"))


# Commits, branches and tags.


def push(payload: Json, action: str) -> hosts.Report:
    kind, ref = hosts.branch(payload.get("ref"))
    web, before, after = _web(payload), text(payload, "before"), text(payload, "after")
    if hosts.is_none(after):
        return hosts.Report(hosts.sentence(who(payload), f"deleted {kind}", hosts.code(ref)))
    is_new = hosts.is_none(before)
    found = items(payload, "commits")
    total = max(len(found), hosts.number(payload, "total_commits_count"))
    tree = f"{web}/-/{'tags' if kind == 'tag' else 'commits'}/{ref}" if web and ref else ""
    compare = f"{web}/-/compare/{before[:64]}...{after[:64]}" if web and before and after and not is_new else tree
    shown = [_commit(commit, payload) for commit in found[: hosts.MAX_COMMITS] if isinstance(commit, dict)]
    if kind == "tag":
        said = hosts.sentence(
            who(payload), "created tag" if is_new else "moved tag", hosts.link(ref or "(unnamed)", tree)
        )
        return hosts.Report(said, items=shown[-1:], quote=hosts.quote(payload, "message"))
    verb = "created branch" if is_new else "pushed to"
    said = hosts.sentence(
        who(payload), verb, hosts.code(ref), total and ":", total and hosts.link(hosts.count(total, "commit"), compare)
    )
    return hosts.Report(said, items=shown, left=total - len(shown), left_url=compare)


def _commit(commit: hosts.Fields, payload: Json) -> hosts.Item:
    author = hosts.name(commit, "author", "name")
    return {
        "mark": hosts.short(commit.get("id")),
        "text": hosts.first(hosts.line(commit, "title"), hosts.first_line(commit, "message"), "(no message)"),
        "url": text(commit, "url"),
        "by": "" if author == who(payload) else author,
    }


# Issues, merge requests, comments.


def _labels(payload: Json) -> list[str]:
    return [hosts.name(each, "title") for each in objects(payload, "labels")]


def _people(payload: Json, key: str) -> str:
    names = [hosts.first(hosts.name(each, "name"), hosts.name(each, "username")) for each in objects(payload, key)]
    return ", ".join(filter(None, names[: hosts.MAX_NAMES]))


def _ticket(thing: Any, sign: str, url: str = "") -> hosts.Part:
    """`!7 Its title`, as GitLab writes it."""
    iid, title = text(thing, "iid")[:20], hosts.line(thing, "title")
    label = " ".join(filter(None, (f"{sign}{iid}" if iid else "", title)))
    return hosts.link(label or "(untitled)", url or text(thing, "url"))


def _changed(payload: Json) -> str:
    """What an update has changed."""
    passed = frozenset(("updated_at", "updated_by_id", "last_edited_at", "last_edited_by_id", "relative_position"))
    names = [hosts.spoken(key.removesuffix("_id")) for key in mapping(payload, "changes") if key not in passed]
    return ", ".join(hosts.name(each) for each in names[: hosts.MAX_NAMES])


def issue(payload: Json, action: str) -> hosts.Report:
    thing = mapping(payload, "object_attributes")
    noun = hosts.first(hosts.spoken(hosts.name(thing, "type")).lower(), "issue")
    if thing.get("confidential") is True:
        noun = f"confidential {noun}"
    return _tracked(payload, action, thing, noun, "#")


def merge_request(payload: Json, action: str) -> hosts.Report:
    thing = mapping(payload, "object_attributes")
    source, target = hosts.name(thing, "source_branch"), hosts.name(thing, "target_branch")
    is_draft = thing.get("draft") is True or thing.get("work_in_progress") is True
    report = _tracked(
        payload, action, thing, "draft merge request" if is_draft and action == "open" else "merge request", "!"
    )
    if action in ("open", "reopen", "merge") and source and target:
        report.facts = hosts.facts(hosts.sentence(hosts.code(source), "→", hosts.code(target)), *report.facts)
    elif action == "update" and text(thing, "oldrev"):
        commit = mapping(thing, "last_commit")
        report.headline = hosts.sentence(who(payload), "pushed to merge request", _ticket(thing, "!"))
        report.items = [_commit(commit, payload)] if commit else []
    if action in _UNMERGED:
        report.icon = "👍"
    return report


def _tracked(payload: Json, action: str, thing: hosts.Fields, noun: str, sign: str) -> hosts.Report:
    verb = hosts.first(_VERBS.get(action, ""), hosts.spoken(action), "reported")
    said = hosts.sentence(who(payload), verb, noun, _ticket(thing, sign))
    changed = _changed(payload) if action == "update" else ""
    details = hosts.joined(
        hosts.fact("Labels", hosts.listed(_labels(payload))),
        hosts.fact("Assigned to", _people(payload, "assignees")),
        hosts.fact("Review by", _people(payload, "reviewers")),
    )
    return hosts.Report(
        said,
        facts=hosts.facts(details if action in ("open", "reopen", "") else hosts.fact("Changed", changed)),
        quote=hosts.quote(thing, "description") if action in ("open", "") else "",
        is_quiet=action in ("update", "unapproved", "unapproval"),
        time=moment(thing.get("updated_at")),
    )


def note(payload: Json, action: str) -> hosts.Report:
    found = mapping(payload, "object_attributes")
    kind, url = text(found, "noteable_type"), text(found, "url")
    verb = "edited a comment on" if action == "update" else "commented on"
    if kind == "MergeRequest":
        on = hosts.sentence("merge request", _ticket(mapping(payload, "merge_request"), "!", url))
    elif kind == "Issue":
        on = hosts.sentence("issue", _ticket(mapping(payload, "issue"), "#", url))
    elif kind == "Snippet":
        on = hosts.sentence(
            "snippet", hosts.link(hosts.first(hosts.line(payload, "snippet", "title"), "(untitled)"), url)
        )
    elif kind == "Commit":
        commit = mapping(payload, "commit")
        message = hosts.first(hosts.line(commit, "title"), hosts.first_line(commit, "message"), "(no message)")
        on = hosts.sentence("commit", hosts.code(hosts.short(commit.get("id"))), hosts.link(message, url))
    else:
        on = hosts.sentence(hosts.link(hosts.first(hosts.spoken(kind).lower(), "something"), url))
    file = hosts.first(hosts.name(found, "position", "new_path"), hosts.name(found, "st_diff", "new_path"))
    at_line = hosts.number(found, "position", "new_line")
    return hosts.Report(
        hosts.sentence(who(payload), verb, on),
        facts=hosts.facts(hosts.fact("File", hosts.code(file), f"line {at_line}" if at_line else "") if file else []),
        quote=hosts.quote(found, "note"),
        is_quiet=action == "update" or found.get("system") is True,
        time=moment(found.get("updated_at")),
    )


# Continuous integration. Each pipeline is a story: what runs and what is green only tells, a failure is news.


def pipeline(payload: Json, action: str) -> hosts.Report:
    run = mapping(payload, "object_attributes")
    id_, time = text(run, "id")[:20], _time(payload, run)
    url = text(run, "url") or (f"{_web(payload)}/-/pipelines/{id_}" if _web(payload) and id_ else "")
    commit, merge = mapping(payload, "commit"), mapping(payload, "merge_request")
    report = hosts.checked(
        hosts.sentence(hosts.name(run, "name") or "The pipeline"),
        hosts.name(run, "ref"),
        "" if action == "running" else _after(run.get("duration")),
        hosts.link(f"#{id_}" if id_ else "details", url),
        action,
    )
    message = hosts.link(
        hosts.first(hosts.line(commit, "title"), hosts.first_line(commit, "message")), text(commit, "url")
    )
    is_red = report.state == "firing"
    report.facts = hosts.facts(
        hosts.fact("Failed", _failed(payload)) if is_red else [],
        hosts.commit(hosts.first(hosts.short(run.get("sha")), hosts.short(commit.get("id"))), message, who(payload)),
        hosts.fact("Merge request", _ticket(merge, "!")) if merge else [],
    )
    report.key = hosts.key("pipeline", where(payload), text(run, "id"))
    report.firing = (str(time),) if is_red else ()  # a retry that fails again is news
    report.time = hosts.in_order(time, action != "running")
    return report


def _failed(payload: Json) -> hosts.Line:
    return hosts.listed(
        [
            hosts.first(hosts.name(build, "name"), "(unnamed)")
            for build in objects(payload, "builds")
            if build.get("status") == "failed" and build.get("allow_failure") is not True
        ]
    )


def _time(payload: Json, run: hosts.Fields) -> int | None:
    """Of the latest thing that the pipeline has done: `created_at` is the same all the time."""
    moments = [moment(run.get("created_at")), moment(run.get("finished_at"))]
    for build in objects(payload, "builds"):
        moments += [moment(build.get(key)) for key in ("created_at", "started_at", "finished_at")]
    return max((each for each in moments if each is not None), default=None)


def _after(seconds: Any) -> str:
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < 1e9
    return hosts.lasted(0, int(seconds * 1000)) if is_number else ""


def build(payload: Json, action: str) -> hosts.Report:
    """Its keys begin with `build_`, or with `job_`, as the event is called elsewhere."""
    kind = "job" if "job_id" in payload else "build"
    job, commit = text(payload, f"{kind}_id")[:20], mapping(payload, "commit")
    is_red = hosts.ending(action).state == "firing"
    report = hosts.checked(
        hosts.sentence("Job", hosts.first(hosts.name(payload, f"{kind}_name"), "(unnamed)")),
        hosts.name(payload, "ref"),
        _after(payload.get(f"{kind}_duration")) if is_red else "",
        hosts.link("details", f"{_web(payload)}/-/jobs/{job}" if _web(payload) and job else ""),
        action,
    )
    reason = hosts.spoken(hosts.name(payload, f"{kind}_failure_reason"))
    report.facts = hosts.facts(
        hosts.joined(
            hosts.fact("Stage", hosts.name(payload, f"{kind}_stage")),
            hosts.fact("Reason", reason) if is_red and reason != "unknown failure" else [],
        ),
        hosts.commit(
            hosts.first(hosts.short(payload.get("sha")), hosts.short(commit.get("sha"))),
            hosts.first_line(commit, "message"),
            who(payload),
        ),
    )
    report.is_quiet = not is_red or payload.get(f"{kind}_allow_failure") is True  # its pipeline says it
    report.key = hosts.key("build", where(payload), text(payload, f"{kind}_id"))
    report.time = moment(payload.get(f"{kind}_finished_at")) or moment(payload.get(f"{kind}_started_at"))
    return report


def deployment(payload: Json, action: str) -> hosts.Report:
    end = hosts.ending(action)
    commit = hosts.link(hosts.line(payload, "commit_title"), text(payload, "commit_url"))
    site = text(payload, "environment_external_url")
    return hosts.Report(
        hosts.deployed(
            hosts.code(hosts.first(hosts.name(payload, "ref"), hosts.name(payload, "short_sha"))),
            action,
            hosts.name(payload, "environment"),
            who(payload),
            hosts.link("details", text(payload, "deployable_url")),
        ),
        end.icon,
        facts=hosts.facts(
            hosts.sentence(hosts.code(hosts.name(payload, "short_sha")), commit),
            hosts.fact("Site", hosts.link(site, site)) if action == "success" and site else [],
        ),
        outcome=action,
        is_quiet=end.is_quiet,
        key=hosts.key("deployment", where(payload), text(payload, "deployment_id")),
        state=end.state,
        time=moment(payload.get("status_changed_at")),
    )


# What else happens to a project.


def release(payload: Json, action: str) -> hosts.Report:
    tag, title = hosts.name(payload, "tag"), hosts.line(payload, "name")
    verb = {"create": "published", "update": "edited", "delete": "deleted"}.get(action, hosts.spoken(action))
    said = hosts.sentence(
        *((who(payload), verb, "release") if who(payload) else ("Release", verb, ":")),  # GitLab does not say by whom
        hosts.sentence(hosts.code(tag), ":") if tag and title and tag not in title else "",
        hosts.link(hosts.first(title, tag, "(unnamed)"), text(payload, "url")),
    )
    return hosts.Report(
        said,
        "🎉" if action == "create" else "",
        quote=hosts.quote(payload, "description", limit=hosts.MAX_NOTES) if action == "create" else "",
        is_quiet=action == "update",
        time=moment(payload.get("released_at")),
    )


def wiki_page(payload: Json, action: str) -> hosts.Report:
    page = mapping(payload, "object_attributes")
    verb = hosts.first(_VERBS.get(action, ""), hosts.spoken(action), "edited")
    return hosts.Report(
        hosts.sentence(
            who(payload),
            verb,
            "the wiki page",
            hosts.link(hosts.first(hosts.line(page, "title"), "(untitled)"), text(page, "url")),
        ),
        facts=hosts.facts(hosts.sentence(hosts.line(page, "message"))),
    )


def feature_flag(payload: Json, action: str) -> hosts.Report:
    flag = mapping(payload, "object_attributes")
    is_on = flag.get("active") is True
    return hosts.Report(
        hosts.sentence(
            who(payload), "turned", "on" if is_on else "off", "the feature flag", hosts.code(hosts.name(flag, "name"))
        ),
        facts=hosts.facts(hosts.sentence(hosts.line(flag, "description"))),
    )


def emoji(payload: Json, action: str) -> hosts.Report:
    found = mapping(payload, "object_attributes")
    kinds = (("merge_request", "!"), ("issue", "#"), ("work_item", "#"))
    on = next(((kind, sign) for kind, sign in kinds if mapping(payload, kind)), None)
    thing = _ticket(mapping(payload, on[0]), on[1], text(found, "awarded_on_url")) if on else None
    return hosts.Report(
        hosts.sentence(
            who(payload),
            hosts.first(_VERBS.get(action, ""), "reacted with"),
            hosts.code(f":{hosts.name(found, 'name')}:"),
            hosts.sentence("to", hosts.spoken(on[0]), thing) if on else "",
        ),
        is_quiet=True,
    )


def access_token(payload: Json, action: str) -> hosts.Report:
    token = mapping(payload, "object_attributes")
    return hosts.Report(
        hosts.sentence(
            "The access token",
            hosts.code(hosts.first(hosts.name(token, "name"), "(unnamed)")),
            "expires on" if hosts.name(token, "expires_at") else "expires soon",
            hosts.name(token, "expires_at"),
        ),
        "⚠️",
    )


def vulnerability(payload: Json, action: str) -> hosts.Report:
    found = mapping(payload, "object_attributes")
    state = hosts.name(found, "state")
    is_over = state in ("resolved", "dismissed")
    return hosts.Report(
        hosts.sentence(
            "Vulnerability",
            state and f"({hosts.spoken(state)}):",
            hosts.link(hosts.first(hosts.line(found, "title"), "(untitled)"), text(found, "url")),
        ),
        "✅" if is_over else "⚠️",
        facts=hosts.facts(
            hosts.fact("Severity", hosts.name(found, "severity")),
            hosts.fact("File", hosts.code(hosts.name(found, "location", "file"))),
            hosts.fact("Known as", hosts.listed([hosts.name(each, "name") for each in objects(found, "identifiers")])),
        ),
        outcome=state,
        key=hosts.key("vulnerability", where(payload), hosts.first(text(found, "id"), text(found, "url"))),
        state="resolved" if is_over else "firing",
        time=moment(found.get("updated_at")),
    )


def milestone(payload: Json, action: str) -> hosts.Report:
    found = mapping(payload, "object_attributes")
    verb = hosts.first(_VERBS.get(action, ""), hosts.spoken(action), "changed")
    url = f"{_web(payload)}/-/milestones/{text(found, 'iid')[:20]}" if _web(payload) and text(found, "iid") else ""
    return hosts.Report(
        hosts.sentence(
            who(payload), verb, "the milestone", hosts.link(hosts.first(hosts.line(found, "title"), "(untitled)"), url)
        ),
        facts=hosts.facts(hosts.fact("Due", hosts.name(found, "due_date"))),
    )


def members(payload: Json, action: str) -> hosts.Report:
    """Group and system hooks: `user_add_to_group`, `user_remove_from_team` …"""
    event = hosts.name(payload, "event_name")
    person = hosts.first(hosts.name(payload, "user_name"), hosts.name(payload, "user_username"), "Somebody")
    verb = "was added to" if "_add_" in event else "was removed from" if "_remove_" in event else "has another role in"
    if "_request_" in event:
        verb = "was refused access to" if "_denied_" in event else "asks for access to"
    role = hosts.first(
        hosts.name(payload, "group_access"), hosts.name(payload, "access_level"), hosts.name(payload, "project_access")
    )
    kind = "group" if event.endswith("group") else "project"
    return hosts.Report(
        hosts.sentence(person, verb, f"the {kind}", f"({role})" if role and "_remove_" not in event else "")
    )


def _anything_else(event: str) -> Make:
    """Mostly of system hooks: `project_create`, `user_failed_login`, `key_destroy` …"""
    noun, _, last = event.rpartition("_")

    def made(payload: Json, action: str) -> hosts.Report:
        thing = mapping(payload, "object_attributes")
        known = _VERBS.get(last, "") if noun else ""
        title = hosts.first(
            *(hosts.line(thing, key) for key in ("title", "name")),
            *(hosts.line(payload, key) for key in ("name", "title", "full_path", "username")),
        )
        old = hosts.first(
            hosts.name(payload, "old_path_with_namespace"),
            hosts.name(payload, "old_full_path"),
            hosts.name(payload, "old_username"),
        )
        said = hosts.link(title, text(thing, "url")) if title else None
        from_old = f"(from {old})" if old else ""
        if known and not action:
            subject = hosts.spoken(noun)
            return hosts.Report(hosts.sentence(f"{subject[:1].upper()}{subject[1:]}", said, f"was {known}", from_old))
        subject = hosts.spoken(event)
        verb = hosts.first(_VERBS.get(action, ""), hosts.spoken(action))
        by = f"by {who(payload)}" if who(payload) and who(payload) != title else ""
        return hosts.Report(
            hosts.sentence(
                f"{subject[:1].upper()}{subject[1:]}", said and ":", said, verb and f"— {verb}", by, from_old
            )
        )

    return made


_REPORTS: dict[str, Make] = {
    "access_token": access_token,
    "build": build,
    "deployment": deployment,
    "emoji": emoji,
    "feature_flag": feature_flag,
    "issue": issue,
    "job": build,
    "merge_request": merge_request,
    "milestone": milestone,
    "note": note,
    "pipeline": pipeline,
    "push": push,
    "release": release,
    "tag_push": push,
    "vulnerability": vulnerability,
    "wiki_page": wiki_page,
    "work_item": issue,
    **dict.fromkeys(
        (
            *("user_add_to_group", "user_remove_from_group", "user_update_for_group"),
            *("user_add_to_team", "user_remove_from_team", "user_update_for_team"),
            *("user_access_request_to_group", "user_access_request_denied_for_group"),
            *("user_access_request_to_project", "user_access_request_denied_for_project"),
        ),
        members,
    ),
}


def recognises(headers: Headers, payload: Any) -> bool:
    return "x-gitlab-event" in headers


def delivery_id(headers: Headers, payload: Any) -> str:
    """`X-Gitlab-Event-UUID` is none: all events of a chain share it, and `X-Gitlab-Webhook-UUID` is the hook's."""
    return hosts.first(headers.get("idempotency-key", ""), headers.get("webhook-id", ""))


_WEB = "https://gitlab.example.org/octo/hello"
SOURCE = Source(
    "gitlab",
    "GitLab",
    recognises,
    read,
    template=hosts.words,
    delivery_id=delivery_id,
    scheme="gitlab",
    sample={
        "object_kind": "push",
        "event_name": "push",
        "ref": "refs/heads/main",
        "before": "95790bf891e76fee5e1747ab589903a6a1f80f22",
        "after": "da1560886d4f094c3e6c9ef40349f7d38b5d27d7",
        "user_name": "Monalisa",
        "user_username": "octocat",
        "project": {"name": "Hello", "web_url": _WEB, "path_with_namespace": "octo/hello"},
        "commits": [
            {
                "id": "da1560886d4f094c3e6c9ef40349f7d38b5d27d7",
                "message": "Say hello to the room\n",
                "title": "Say hello to the room",
                "url": f"{_WEB}/-/commit/da1560886d4f094c3e6c9ef40349f7d38b5d27d7",
                "author": {"name": "Monalisa"},
            }
        ],
        "total_commits_count": 1,
    },
    sample_headers={"x-gitlab-event": "Push Hook"},
)
