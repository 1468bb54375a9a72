"""What GitHub's events have in common: who did it and where, and verbs."""

from collections.abc import Callable
from typing import Any

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.reading import mapping, objects, text

Make = Callable[[hosts.Fields, str], hosts.Report]


def who(payload: hosts.Fields) -> str:
    """Who did it: GitHub knows logins; Gitea's systems have none."""
    return hosts.first(
        hosts.name(payload, "sender", "login"),
        hosts.name(payload, "pusher", "name"),
        hosts.name(payload, "pusher", "login"),
    )


def where(payload: hosts.Fields) -> str:
    return hosts.first(
        hosts.name(payload, "repository", "full_name"),
        hosts.name(payload, "organization", "login"),
        hosts.name(payload, "organization", "username"),
        hosts.name(payload, "enterprise", "name"),
        hosts.name(payload, "installation", "account", "login"),
    )


def repository_of(payload: hosts.Fields, key: str = "repository") -> hosts.Part:
    found = mapping(payload, key)
    return hosts.link(hosts.first(hosts.name(found, "full_name"), hosts.name(found, "name")), text(found, "html_url"))


def names(value: Any, *path: str, key: str = "name") -> list[str]:
    return [hosts.name(each, key) for each in objects(value, *path)]


VERBS = {
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
