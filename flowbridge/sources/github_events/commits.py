"""GitHub: commits, branches and tags."""

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import (
    Fields,
    Report,
    branch,
    code,
    count,
    first,
    first_line,
    link,
    name,
    number,
    sentence,
    short,
)
from flowbridge.sources.github_events.common import Make, repository_of, who
from flowbridge.sources.reading import at, items, mapping, moment, text


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
        return Report(sentence(who(payload), "created the repository", repository_of(payload)))
    return Report(sentence(who(payload), "created", kind or "branch", code(branch(payload.get("ref"))[1])))


def deleted(payload: Fields, action: str) -> Report:
    return Report(
        sentence(who(payload), "deleted", name(payload, "ref_type") or "branch", code(branch(payload.get("ref"))[1]))
    )


REPORTS: dict[str, Make] = {
    "create": created,
    "delete": deleted,
    "push": push,
}
