"""GitHub: alerts and advisories."""

from collections.abc import Callable, Sequence

from flowbridge.sources import code_hosts as hosts
from flowbridge.sources.github_events.common import VERBS, Make, where
from flowbridge.sources.reading import mapping, moment, objects, text


def alert(noun: str, title: Callable[[hosts.Fields], hosts.Line], event: str) -> Make:
    """Alerts are stories: open ones fire."""

    def made(payload: hosts.Fields, action: str) -> hosts.Report:
        found = mapping(payload, "alert")
        is_open, is_over = action in _OPENED, action in _OVER
        number_ = text(found, "number")[:20]
        id_ = number_ or text(found, "id")
        verb = "" if action in ("created", "create") else VERBS.get(action) or hosts.spoken(action)
        person = hosts.first(*(hosts.name(found, key, "login") for key in ("dismissed_by", "dismisser", "resolved_by")))
        done = f"({verb} by {person})" if is_over and person and verb else f"({verb})" if verb else ""
        label = f"{noun} #{number_}" if number_ else noun
        return hosts.Report(
            hosts.sentence(label, done, ":", title(found)),
            "✅" if is_over else "⚠️",
            facts=hosts.facts(
                hosts.joined(*(hosts.fact(label, _first_of(found, paths)) for label, paths in _DETAILS.items())),
            ),
            key=hosts.key(event, where(payload), id_),
            state="firing" if is_open else "resolved" if is_over else "",
            is_quiet=not (is_open or is_over),
            time=moment(found.get("updated_at")) or moment(found.get("fixed_at")) or moment(found.get("created_at")),
        )

    return made


def _first_of(found: hosts.Fields, paths: Sequence[Sequence[str]]) -> str:
    return hosts.first(*(hosts.name(found, *path) for path in paths))


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


def _dependabot(found: hosts.Fields) -> hosts.Line:
    advisory = mapping(found, "security_advisory")
    id_ = hosts.first(hosts.name(advisory, "cve_id"), hosts.name(advisory, "ghsa_id"))
    return hosts.sentence(
        id_,
        hosts.link(hosts.first(hosts.line(advisory, "summary"), "a vulnerable dependency"), text(found, "html_url")),
    )


def _scanning(found: hosts.Fields) -> hosts.Line:
    tool = hosts.name(found, "tool", "name")
    what = hosts.first(hosts.line(found, "rule", "description"), hosts.name(found, "rule", "id"), "a finding")
    return hosts.sentence(tool and f"{tool} says", hosts.link(what, text(found, "html_url")))


def _secret(found: hosts.Fields) -> hosts.Line:
    kind = hosts.first(
        hosts.name(found, "secret_type_display_name"), hosts.spoken(hosts.name(found, "secret_type")), "a secret"
    )
    return hosts.sentence(hosts.link(kind, text(found, "html_url")))


def _vulnerability(found: hosts.Fields) -> hosts.Line:
    id_ = hosts.first(hosts.name(found, "external_identifier"), hosts.name(found, "ghsa_id"), "a vulnerability")
    return hosts.sentence(hosts.link(id_, text(found, "external_reference")))


def advisory(payload: hosts.Fields, action: str) -> hosts.Report:
    """Of GitHub's database, or of this repository."""
    found = mapping(payload, "security_advisory") or mapping(payload, "repository_advisory")
    ghsa = hosts.name(found, "ghsa_id")
    url = hosts.first(text(found, "html_url"), f"https://github.com/advisories/{ghsa}" if ghsa else "")
    packages = list(dict.fromkeys(hosts.name(each, "package", "name") for each in objects(found, "vulnerabilities")))
    fixes = dict.fromkeys(
        hosts.first(hosts.name(each, "first_patched_version", "identifier"), hosts.name(each, "patched_versions"))
        for each in objects(found, "vulnerabilities")
    )
    return hosts.Report(
        hosts.sentence(
            f"Security advisory {hosts.spoken(action) or 'changed'}:",
            hosts.link(hosts.first(hosts.line(found, "summary"), ghsa, "(untitled)"), url),
        ),
        "⚠️" if action in ("published", "reported") else "",
        facts=hosts.facts(
            hosts.joined(
                hosts.fact("Severity", hosts.name(found, "severity")),
                hosts.fact("Packages" if len(packages) > 1 else "Package", hosts.listed(packages)),
                hosts.fact("Fixed in", ", ".join([fix for fix in fixes if fix][: hosts.MAX_NAMES])),
            ),
            hosts.fact("Known as", ", ".join(filter(None, (ghsa, hosts.name(found, "cve_id"))))),
        ),
        quote=hosts.quote(found, "description") if action in ("published", "reported") else "",
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
