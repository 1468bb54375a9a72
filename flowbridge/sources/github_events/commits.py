"""GitHub: commits, branches and tags."""

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import Make, repository_of, who
from flowbridge.sources.reading import at, items, mapping, moment, text


def push(payload: hosts.Fields, action: str, compare: str = "compare") -> hosts.Report:
    kind, ref = hosts.branch(payload.get("ref"))
    url = text(payload, compare)
    if payload.get("deleted") is True or hosts.is_none(payload.get("after")):
        return hosts.Report(hosts.sentence(who(payload), f"deleted {kind}", hosts.code(ref)))
    found = items(payload, "commits")
    total = max(len(found), hosts.number(payload, "total_commits"))
    is_new = payload.get("created") is True or hosts.is_none(payload.get("before"))
    if is_new and kind == "tag":
        head = mapping(payload, "head_commit")
        return hosts.Report(
            hosts.sentence(who(payload), "created tag", hosts.code(ref)), items=[_commit(head, "")] if head else []
        )
    verb = "created branch" if is_new else "force-pushed to" if payload.get("forced") is True else "pushed to"
    said = hosts.sentence(
        who(payload), verb, hosts.code(ref), total and ":", total and hosts.link(hosts.count(total, "commit"), url)
    )
    shown = [_commit(commit, who(payload)) for commit in found[: hosts.MAX_COMMITS] if isinstance(commit, dict)]
    return hosts.Report(said, items=shown, left=total - len(shown), left_url=url, time=_pushed_at(payload))


def _pushed_at(payload: hosts.Fields) -> int | None:
    return moment(at(payload, "repository", "pushed_at")) or moment(at(payload, "head_commit", "timestamp"))


def _commit(commit: hosts.Fields, pusher: str) -> hosts.Item:
    author = mapping(commit, "author")
    names = [hosts.name(author, "username"), hosts.name(author, "name")]
    return {
        "mark": hosts.short(commit.get("id")),
        "text": hosts.first_line(commit, "message") or "(no message)",
        "url": text(commit, "url"),
        "by": "" if pusher and pusher in names else hosts.first(*names),
    }


def created(payload: hosts.Fields, action: str) -> hosts.Report:
    kind = hosts.name(payload, "ref_type")
    if kind == "repository":
        return hosts.Report(hosts.sentence(who(payload), "created the repository", repository_of(payload)))
    return hosts.Report(
        hosts.sentence(who(payload), "created", kind or "branch", hosts.code(hosts.branch(payload.get("ref"))[1]))
    )


def deleted(payload: hosts.Fields, action: str) -> hosts.Report:
    return hosts.Report(
        hosts.sentence(
            who(payload),
            "deleted",
            hosts.name(payload, "ref_type") or "branch",
            hosts.code(hosts.branch(payload.get("ref"))[1]),
        )
    )


REPORTS: dict[str, Make] = {
    "create": created,
    "delete": deleted,
    "push": push,
}
