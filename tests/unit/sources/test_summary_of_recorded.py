"""Tools that have no source of their own: what rooms read of their recorded bodies."""

import pytest

from tests.unit.sources.test_alerting import GOLDEN, PAYLOADS, body, golden, made, only

FOLDERS = ("bugsnag", "checkmk", "dockerhub", "flux", "harbor", "librenms", "radarr", "sonarr", "statuspage", "stripe")
RECORDED = [
    str(file.relative_to(PAYLOADS).with_suffix(""))
    for folder in (*FOLDERS, "travisci", "zabbix")
    for file in sorted((PAYLOADS / folder).glob("*.json"))
]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_body_is_summed_up_as_it_was_looked_at(name: str) -> None:
    found = made(body(name))
    assert (found["source"], found["warnings"]) == ("generic", [])
    golden(GOLDEN / f"{name}.html", only(found)["html"])
    golden(GOLDEN / f"{name}.txt", only(found)["body"])


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("bugsnag/html-error-message", "1000th exception (https://app.bugsnag.com/my-company/my-test-project/errors/"),
        ("checkmk/host-recovery", "CheckMK server1 - DOWN -> UP — UP · OK"),
        ("dockerhub/push", "person1/testhook"),
        ("flux/kustomization-error", "Reconciling: service/apps/webapp validation error: spec.type: Unsupported"),
        ("harbor/scanning-completed", "SCANNING_COMPLETED: test/alpine/helm"),
        ("librenms/recovered", "Device 10.10.1.147 recovered from Devices up/down — ok"),
        ("radarr/health-error", "Health: Movie Gotham City Sirens (tmdbid 416649) was removed from TMDb — error"),
        ("sonarr/grab", "Grab: NCIS"),
        ("statuspage/incident-update", "Virginia Is Down (http://j.mp/18zyDQx) — critical · monitoring"),
        ("stripe/invoice-payment-failed", "invoice.payment_failed"),
        ("travisci/build", "the commit message (https://travis-ci.org/person1/minimal/builds/1) — Passed"),
        ("zabbix/problem", "Zabbix agent on www.example.com is unreachable for 5 minutes (https://zabbix.example.com/"),
    ],
)
def test_summary_begins_with_what_has_happened(name: str, begins: str) -> None:
    assert only(made(body(name)))["body"].startswith(begins)
