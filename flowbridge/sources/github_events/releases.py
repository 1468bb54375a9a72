"""GitHub: releases and packages."""

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import Fields, Report, code, first, line, link, name, quote, sentence, spoken
from flowbridge.sources.github_events.common import VERBS, Make, who
from flowbridge.sources.reading import mapping, moment, text

# Each release is reported three or four times: as published is the one that says that people can have it.
_QUIET_RELEASES = frozenset(("created", "edited", "updated", "released", "prereleased"))


def release(payload: Fields, action: str) -> Report:
    thing = mapping(payload, "release")
    tag, title = name(thing, "tag_name"), line(thing, "name")
    noun = "pre-release" if thing.get("prerelease") is True else "draft release" if thing.get("draft") else "release"
    is_told = tag in title
    return Report(
        sentence(
            who(payload),
            VERBS.get(action) or spoken(action) or "published",
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


REPORTS: dict[str, Make] = {
    "package": package,
    "registry_package": package,
    "release": release,
}
