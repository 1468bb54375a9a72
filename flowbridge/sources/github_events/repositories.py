"""GitHub: what else happens to a repository, its organization, and apps."""

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import Make, names, repository_of, who
from flowbridge.sources.reading import mapping, objects, text


def star(payload: hosts.Fields, action: str) -> hosts.Report:
    stars = hosts.number(payload, "repository", "stargazers_count")
    if action == "deleted":
        return hosts.Report(hosts.sentence(who(payload), "took back a star"), is_quiet=True)
    return hosts.Report(
        hosts.sentence(who(payload), "starred the repository", stars and f"({hosts.count(stars, 'star')})"), "⭐"
    )


def watch(payload: hosts.Fields, action: str) -> hosts.Report:
    return hosts.Report(hosts.sentence(who(payload), "watches the repository"), "👀")


def fork(payload: hosts.Fields, action: str) -> hosts.Report:
    return hosts.Report(hosts.sentence(who(payload), "forked the repository to", repository_of(payload, "forkee")))


def public(payload: hosts.Fields, action: str) -> hosts.Report:
    return hosts.Report(hosts.sentence(who(payload), "made the repository public:", repository_of(payload)))


def repository(payload: hosts.Fields, action: str) -> hosts.Report:
    verb = {"publicized": "made public", "privatized": "made private"}.get(action, hosts.spoken(action) or "changed")
    old = hosts.first(
        hosts.name(payload, "changes", "repository", "name", "from"),
        hosts.name(payload, "changes", "owner", "from", "user", "login"),
        hosts.name(payload, "changes", "owner", "from", "organization", "login"),
    )
    kind, _, rest = verb.partition(" ")
    said = hosts.sentence(
        who(payload),
        kind,
        "the repository",
        rest,
        old and f"from {old}",
        (rest or old) and ":",
        repository_of(payload),
    )
    return hosts.Report(said, is_quiet=action == "edited")


def gollum(payload: hosts.Fields, action: str) -> hosts.Report:
    pages = list(objects(payload, "pages"))
    shown = [_page(page) for page in pages[: hosts.MAX_COMMITS]]
    if len(pages) == 1:
        verb = hosts.name(pages[0], "action") or "edited"
        page = hosts.link(hosts.first(hosts.line(pages[0], "title"), "(untitled)"), text(pages[0], "html_url"))
        return hosts.Report(
            hosts.sentence(who(payload), verb, "the wiki page", page), quote=hosts.quote(pages[0], "summary")
        )
    return hosts.Report(
        hosts.sentence(who(payload), "changed", hosts.count(len(pages), "page"), "of the wiki"),
        items=shown,
        left=max(0, len(pages) - len(shown)),
    )


def _page(page: hosts.Fields) -> hosts.Item:
    """A page of a wiki, as a line of a list."""
    title, action = hosts.first(hosts.line(page, "title"), "(untitled)"), hosts.name(page, "action") or "edited"
    return {"mark": "", "text": f"{title} ({action})", "url": text(page, "html_url"), "by": ""}


def member(payload: hosts.Fields, action: str) -> hosts.Report:
    person = hosts.first(hosts.name(payload, "member", "login"), "somebody")
    if action in ("added", "removed"):
        to = "to" if action == "added" else "from"
        return hosts.Report(hosts.sentence(who(payload), action, person, to, "the collaborators"))
    return hosts.Report(hosts.sentence(who(payload), "changed the permissions of", person))


def membership(payload: hosts.Fields, action: str) -> hosts.Report:
    person = hosts.first(hosts.name(payload, "member", "login"), "somebody")
    to = "from" if action == "removed" else "to"
    return hosts.Report(hosts.sentence(who(payload), action or "added", person, to, "the team", _team(payload)))


def team(payload: hosts.Fields, action: str) -> hosts.Report:
    if action in ("added_to_repository", "removed_from_repository", ""):
        did = "removed from" if action.startswith("removed") else "added to"
        return hosts.Report(hosts.sentence(who(payload), did, "the repository:", "team", _team(payload)))
    return hosts.Report(hosts.sentence(who(payload), hosts.spoken(action), "the team", _team(payload)))


def _team(payload: hosts.Fields) -> hosts.Part:
    return hosts.link(hosts.first(hosts.name(payload, "team", "name"), "(deleted)"), text(payload, "team", "html_url"))


def organization(payload: hosts.Fields, action: str) -> hosts.Report:
    person = hosts.first(
        hosts.name(payload, "membership", "user", "login"),
        hosts.name(payload, "invitation", "login"),
        hosts.name(payload, "user", "login"),
    )
    verbs = {"member_added": "added", "member_removed": "removed", "member_invited": "invited"}
    if action in verbs:
        to = "from" if action == "member_removed" else "to"
        return hosts.Report(hosts.sentence(who(payload), verbs[action], person or "somebody", to, "the organization"))
    old = hosts.name(payload, "changes", "login", "from")
    return hosts.Report(
        hosts.sentence(who(payload), hosts.spoken(action) or "changed", "the organization", old and f"(from {old})")
    )


def org_block(payload: hosts.Fields, action: str) -> hosts.Report:
    person = hosts.link(
        hosts.first(hosts.name(payload, "blocked_user", "login"), "somebody"), text(payload, "blocked_user", "html_url")
    )
    return hosts.Report(hosts.sentence(who(payload), action or "blocked", person))


def installation(payload: hosts.Fields, action: str) -> hosts.Report:
    verbs = {
        "created": "installed",
        "deleted": "uninstalled",
        "suspend": "suspended",
        "unsuspend": "resumed",
        "new_permissions_accepted": "accepted new permissions of",
    }
    return hosts.Report(
        hosts.sentence(who(payload), verbs.get(action, hosts.spoken(action)), _app(payload)),
        facts=hosts.facts(hosts.fact("Repositories", hosts.listed(names(payload, "repositories", key="full_name")))),
    )


def installation_repositories(payload: hosts.Fields, action: str) -> hosts.Report:
    added = names(payload, "repositories_added", key="full_name")
    removed = names(payload, "repositories_removed", key="full_name")
    return hosts.Report(
        hosts.sentence(who(payload), "changed the repositories of", _app(payload)),
        facts=hosts.facts(hosts.fact("Added", hosts.listed(added)), hosts.fact("Removed", hosts.listed(removed))),
    )


def _app(payload: hosts.Fields) -> hosts.Part:
    slug = hosts.name(payload, "installation", "app_slug")
    return hosts.link(f"the app {slug}" if slug else "an app", text(payload, "installation", "html_url"))


def authorization(payload: hosts.Fields, action: str) -> hosts.Report:
    return hosts.Report(hosts.sentence(who(payload), "took back the authorization of this app"))


def meta(payload: hosts.Fields, action: str) -> hosts.Report:
    return hosts.Report(hosts.sentence(who(payload), "deleted this webhook: nothing more will come from it"))


def purchase(payload: hosts.Fields, action: str) -> hosts.Report:
    found = mapping(payload, "marketplace_purchase")
    buyer, plan = hosts.name(found, "account", "login"), hosts.name(found, "plan", "name")
    return hosts.Report(
        hosts.sentence(buyer or who(payload), hosts.spoken(action), "the Marketplace plan", hosts.code(plan))
    )


def sponsorship(payload: hosts.Fields, action: str) -> hosts.Report:
    found = mapping(payload, "sponsorship")
    sponsor = hosts.first(hosts.name(found, "sponsor", "login"), who(payload))
    tier = hosts.name(found, "tier", "name")
    verb = {
        "created": "sponsors",
        "cancelled": "no longer sponsors",
        "tier_changed": "changed the tier of sponsoring",
        "pending_tier_change": "will change the tier of sponsoring",
        "pending_cancellation": "will no longer sponsor",
    }.get(action, "changed sponsoring")
    return hosts.Report(
        hosts.sentence(sponsor, verb, hosts.name(found, "sponsorable", "login"), tier and f"({tier})"), "💖"
    )


def dispatch(payload: hosts.Fields, action: str) -> hosts.Report:
    kind = hosts.first(action, hosts.name(payload, "workflow").rpartition("/")[2], "a workflow")
    ref = hosts.branch(hosts.first(text(payload, "ref"), text(payload, "branch")))[1]
    return hosts.Report(
        hosts.sentence(who(payload), "triggered", hosts.code(kind), ref and "on", hosts.code(ref)), is_quiet=True
    )


def repository_import(payload: hosts.Fields, action: str) -> hosts.Report:
    outcome = hosts.name(payload, "status")
    return hosts.Report(hosts.sentence("The import of the repository:", outcome or "done"), hosts.ending(outcome).icon)


def projects_item(payload: hosts.Fields, action: str) -> hosts.Report:
    kind = hosts.name(payload, "projects_v2_item", "content_type")
    noun = {"Issue": "an issue", "PullRequest": "a pull request", "DraftIssue": "a draft"}.get(kind, "an item")
    verb, place = {
        "created": ("added", "to a project"),
        "deleted": ("removed", "from a project"),
        "archived": ("archived", "in a project"),
        "restored": ("restored", "in a project"),
        "converted": ("converted", "of a project into an issue"),
        "edited": ("changed", "in a project"),
        "reordered": ("moved", "in a project"),
    }.get(action, (hosts.spoken(action), "in a project"))
    return hosts.Report(hosts.sentence(who(payload), verb, noun, place), is_quiet=action in ("edited", "reordered"))


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
