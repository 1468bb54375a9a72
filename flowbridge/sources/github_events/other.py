"""GitHub: anything else, by its name and its action."""

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import VERBS, Make, who
from flowbridge.sources.reading import mapping, text

_QUIET_EVENTS = frozenset(("label", "merge_group", "project_card", "project_column", "workflow_dispatch"))
_THINGS = {  # event → what it is called, and where it is; its name is found
    "branch_protection_rule": ("branch protection rule", "rule"),
    "deploy_key": ("deploy key", "key"),
    "registry_package": ("package", "registry_package"),
    "projects_v2": ("project", "projects_v2"),
    "repository_ruleset": ("ruleset", "repository_ruleset"),
}


def report(event: str) -> Make:
    noun, key = _THINGS.get(event, (hosts.spoken(event), event))

    def made(payload: hosts.Fields, action: str) -> hosts.Report:
        thing = mapping(payload, key)
        title = hosts.first(
            *(hosts.line(thing, each) for each in ("title", "name", "login", "full_name", "note", "slug"))
        )
        said = hosts.link(title, text(thing, "html_url")) if title else None
        verb = VERBS.get(action, hosts.spoken(action))
        past = verb.partition(" ")[0].endswith("ed")
        by = who(payload)
        if by and past:
            known = hosts.sentence(by, verb, "the" if title else _article(noun), noun, said)
        elif by:
            known = hosts.sentence(f"{by}:", noun, said, verb)
        else:
            known = hosts.sentence(noun[:1].upper() + noun[1:], said, past and "was", verb)
        return hosts.Report(known, is_quiet=event in _QUIET_EVENTS)

    return made


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"
