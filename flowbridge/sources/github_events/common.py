"""What GitHub's events have in common: who did it and where, and verbs."""

from collections.abc import Callable
from typing import Any

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import Fields, Report, first, link, name
from flowbridge.sources.reading import mapping, objects, text

Make = Callable[[Fields, str], Report]


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


def repository_of(payload: Fields, key: str = "repository") -> code_hosts.Part:
    found = mapping(payload, key)
    return link(first(name(found, "full_name"), name(found, "name")), text(found, "html_url"))


def names(value: Any, *path: str, key: str = "name") -> list[str]:
    return [name(each, key) for each in objects(value, *path)]


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
