"""GitHub: what else happens to a repository, its organization, and apps."""

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import (
    Fields,
    Report,
    branch,
    code,
    count,
    ending,
    fact,
    facts,
    first,
    line,
    link,
    listed,
    name,
    number,
    quote,
    sentence,
    spoken,
)
from flowbridge.sources.github_events.common import Make, names, repository_of, who
from flowbridge.sources.reading import mapping, objects, text


def star(payload: Fields, action: str) -> Report:
    stars = number(payload, "repository", "stargazers_count")
    if action == "deleted":
        return Report(sentence(who(payload), "took back a star"), is_quiet=True)
    return Report(sentence(who(payload), "starred the repository", stars and f"({count(stars, 'star')})"), "⭐")


def watch(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "watches the repository"), "👀")


def fork(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "forked the repository to", repository_of(payload, "forkee")))


def public(payload: Fields, action: str) -> Report:
    return Report(sentence(who(payload), "made the repository public:", repository_of(payload)))


def repository(payload: Fields, action: str) -> Report:
    verb = {"publicized": "made public", "privatized": "made private"}.get(action, spoken(action) or "changed")
    old = first(
        name(payload, "changes", "repository", "name", "from"),
        name(payload, "changes", "owner", "from", "user", "login"),
        name(payload, "changes", "owner", "from", "organization", "login"),
    )
    kind, _, rest = verb.partition(" ")
    said = sentence(
        who(payload),
        kind,
        "the repository",
        rest,
        old and f"from {old}",
        (rest or old) and ":",
        repository_of(payload),
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
        facts=facts(fact("Repositories", listed(names(payload, "repositories", key="full_name")))),
    )


def installation_repositories(payload: Fields, action: str) -> Report:
    added = names(payload, "repositories_added", key="full_name")
    removed = names(payload, "repositories_removed", key="full_name")
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


REPORTS: dict[str, Make] = {
    "fork": fork,
    "github_app_authorization": authorization,
    "gollum": gollum,
    "installation": installation,
    "installation_repositories": installation_repositories,
    "marketplace_purchase": purchase,
    "member": member,
    "membership": membership,
    "meta": meta,
    "organization": organization,
    "org_block": org_block,
    "projects_v2_item": projects_item,
    "public": public,
    "repository": repository,
    "repository_dispatch": dispatch,
    "repository_import": repository_import,
    "sponsorship": sponsorship,
    "star": star,
    "team": team,
    "team_add": team,
    "watch": watch,
    "workflow_dispatch": dispatch,
}
