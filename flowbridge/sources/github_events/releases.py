"""GitHub: releases and packages."""

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import VERBS, Make, who
from flowbridge.sources.reading import mapping, moment, text

# Each release is reported three or four times: as published is the one that says that people can have it.
_QUIET_RELEASES = frozenset(("created", "edited", "updated", "released", "prereleased"))


def release(payload: hosts.Fields, action: str) -> hosts.Report:
    thing = mapping(payload, "release")
    tag, title = hosts.name(thing, "tag_name"), hosts.line(thing, "name")
    noun = "pre-release" if thing.get("prerelease") is True else "draft release" if thing.get("draft") else "release"
    is_told = tag in title
    return hosts.Report(
        hosts.sentence(
            who(payload),
            VERBS.get(action) or hosts.spoken(action) or "published",
            noun,
            hosts.sentence(hosts.code(tag), ":") if tag and title and not is_told else "",
            hosts.link(hosts.first(title, tag, "(unnamed)"), text(thing, "html_url")),
        ),
        "🎉" if action == "published" else "",
        quote=hosts.quote(thing, "body", limit=hosts.MAX_NOTES) if action in ("published", "created") else "",
        is_quiet=action in _QUIET_RELEASES,
        time=moment(thing.get("published_at")),
    )


def package(payload: hosts.Fields, action: str) -> hosts.Report:
    found = mapping(payload, "package") or mapping(payload, "registry_package")
    version = mapping(found, "package_version")
    named = hosts.first(
        hosts.name(version, "container_metadata", "tag", "name"),
        hosts.name(version, "version"),
        hosts.name(version, "name"),
    )
    named = named[:19] if named.startswith("sha256:") else named
    label = " ".join(filter(None, (hosts.first(hosts.name(found, "name"), "(unnamed)"), named)))
    kind = hosts.name(found, "package_type").lower()
    url = hosts.first(text(version, "html_url"), text(found, "html_url"))
    return hosts.Report(
        hosts.sentence(who(payload), hosts.spoken(action) or "published", kind, "package", hosts.link(label, url))
    )


REPORTS: dict[str, Make] = {
    "package": package,
    "registry_package": package,
    "release": release,
}
