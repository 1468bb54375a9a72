"""GitHub: alerts and advisories."""

from collections.abc import Callable, Sequence

from flowbridge.sources import code_hosts
from flowbridge.sources.code_hosts import (
    Fields,
    Line,
    Report,
    fact,
    facts,
    first,
    joined,
    line,
    link,
    listed,
    name,
    quote,
    sentence,
    spoken,
)
from flowbridge.sources.github_events.common import VERBS, Make, where
from flowbridge.sources.reading import mapping, moment, objects, text


def alert(noun: str, title: Callable[[Fields], Line], event: str) -> Make:
    """Alerts are stories: open ones fire."""

    def made(payload: Fields, action: str) -> Report:
        found = mapping(payload, "alert")
        is_open, is_over = action in _OPENED, action in _OVER
        number_ = text(found, "number")[:20]
        id_ = number_ or text(found, "id")
        verb = "" if action in ("created", "create") else VERBS.get(action) or spoken(action)
        person = first(*(name(found, key, "login") for key in ("dismissed_by", "dismisser", "resolved_by")))
        done = f"({verb} by {person})" if is_over and person and verb else f"({verb})" if verb else ""
        label = f"{noun} #{number_}" if number_ else noun
        return Report(
            sentence(label, done, ":", title(found)),
            "✅" if is_over else "⚠️",
            facts=facts(
                joined(*(fact(label, _first_of(found, paths)) for label, paths in _DETAILS.items())),
            ),
            key=code_hosts.key(event, where(payload), id_),
            state="firing" if is_open else "resolved" if is_over else "",
            is_quiet=not (is_open or is_over),
            time=moment(found.get("updated_at")) or moment(found.get("fixed_at")) or moment(found.get("created_at")),
        )

    return made


def _first_of(found: Fields, paths: Sequence[Sequence[str]]) -> str:
    return first(*(name(found, *path) for path in paths))


_OPENED = frozenset(("created", "create", "reopened", "reopened_by_user", "reintroduced", "auto_reopened"))
_OVER = frozenset(
    ("fixed", "resolved", "resolve", "dismissed", "dismiss", "closed_by_user", "auto_dismissed", "revoked")
)
_DETAILS = {
    "Severity": (("security_advisory", "severity"), ("rule", "severity"), ("severity",)),
    "Package": (("dependency", "package", "name"), ("affected_package_name",)),
    "File": (("dependency", "manifest_path"), ("most_recent_instance", "location", "path")),
    "Fixed in": (("security_vulnerability", "first_patched_version", "identifier"), ("fixed_in",)),
    "Reason": (("dismissed_reason",), ("dismiss_reason",), ("resolution",)),
}


def _dependabot(found: Fields) -> Line:
    advisory = mapping(found, "security_advisory")
    id_ = first(name(advisory, "cve_id"), name(advisory, "ghsa_id"))
    return sentence(id_, link(first(line(advisory, "summary"), "a vulnerable dependency"), text(found, "html_url")))


def _scanning(found: Fields) -> Line:
    tool = name(found, "tool", "name")
    what = first(line(found, "rule", "description"), name(found, "rule", "id"), "a finding")
    return sentence(tool and f"{tool} says", link(what, text(found, "html_url")))


def _secret(found: Fields) -> Line:
    kind = first(name(found, "secret_type_display_name"), spoken(name(found, "secret_type")), "a secret")
    return sentence(link(kind, text(found, "html_url")))


def _vulnerability(found: Fields) -> Line:
    id_ = first(name(found, "external_identifier"), name(found, "ghsa_id"), "a vulnerability")
    return sentence(link(id_, text(found, "external_reference")))


def advisory(payload: Fields, action: str) -> Report:
    """Of GitHub's database, or of this repository."""
    found = mapping(payload, "security_advisory") or mapping(payload, "repository_advisory")
    ghsa = name(found, "ghsa_id")
    url = first(text(found, "html_url"), f"https://github.com/advisories/{ghsa}" if ghsa else "")
    packages = list(dict.fromkeys(name(each, "package", "name") for each in objects(found, "vulnerabilities")))
    fixes = dict.fromkeys(
        first(name(each, "first_patched_version", "identifier"), name(each, "patched_versions"))
        for each in objects(found, "vulnerabilities")
    )
    return Report(
        sentence(
            f"Security advisory {spoken(action) or 'changed'}:",
            link(first(line(found, "summary"), ghsa, "(untitled)"), url),
        ),
        "⚠️" if action in ("published", "reported") else "",
        facts=facts(
            joined(
                fact("Severity", name(found, "severity")),
                fact("Packages" if len(packages) > 1 else "Package", listed(packages)),
                fact("Fixed in", ", ".join([fix for fix in fixes if fix][: code_hosts.MAX_NAMES])),
            ),
            fact("Known as", ", ".join(filter(None, (ghsa, name(found, "cve_id"))))),
        ),
        quote=quote(found, "description") if action in ("published", "reported") else "",
        is_quiet=action == "updated",
        time=moment(found.get("updated_at")),
    )


REPORTS: dict[str, Make] = {
    "code_scanning_alert": alert("Code scanning alert", _scanning, "code_scanning_alert"),
    "dependabot_alert": alert("Dependabot alert", _dependabot, "dependabot_alert"),
    "repository_advisory": advisory,
    "repository_vulnerability_alert": alert("Vulnerability alert", _vulnerability, "repository_vulnerability_alert"),
    "secret_scanning_alert": alert("Secret scanning alert", _secret, "secret_scanning_alert"),
    "security_advisory": advisory,
}
