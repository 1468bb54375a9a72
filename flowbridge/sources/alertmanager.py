"""Prometheus Alertmanager's webhook_config, version 4 of its body (and what else speaks it: Mimir, VictoriaMetrics).

It sends a group of alerts each time that one begins or ends, the ended ones listed until then; the same again each
`repeat_interval`; and so does each member of an HA pair. There is no delivery id, and no signature.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from flowbridge.sources.alerts import Alert, notices
from flowbridge.sources.reading import at, objects, text
from flowbridge.sources.report import web, words
from flowbridge.sources.source import Headers, Incoming, Nothing, Notice, Source, UnrecognisedError


def recognises(headers: Headers, payload: Any) -> bool:
    return (
        isinstance(at(payload, "alerts"), list)
        and any(isinstance(at(payload, name), dict) for name in ("groupLabels", "commonLabels"))
        and at(payload, "orgId") is None  # Grafana's
    )


def read(incoming: Incoming) -> Sequence[Notice] | Nothing:
    payload = incoming.payload
    if not isinstance(at(payload, "alerts"), list):
        raise UnrecognisedError("it has no list of alerts")
    status = text(payload, "status")
    alerts = [
        Alert.read(alert, status, [("Source", text(alert, "generatorURL"))] if web(alert.get("generatorURL")) else [])
        for alert in objects(payload, "alerts")
    ]
    return notices(payload, alerts, incoming.per, links=_links(payload))


def _links(payload: Any) -> list[tuple[str, str]]:
    base = web(at(payload, "externalURL"))
    receiver = quote(text(payload, "receiver"), safe="", errors="replace")
    return [("Alertmanager", f"{base.rstrip('/')}/#/alerts?receiver={receiver}")] if base else []


SAMPLE = {
    "receiver": "flowbridge",
    "status": "firing",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "HostDown", "instance": f"web-{number}:9100", "severity": "critical"},
            "annotations": {
                "summary": f"web-{number} does not answer",
                "runbook_url": "https://runbooks.example.org/HostDown",
            },
            "startsAt": "2026-11-30T00:28:04.938Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "https://prometheus.example.org/graph?g0.expr=up+%3D%3D+0&g0.tab=1",
            "fingerprint": f"a040726554fc852{number}",
        }
        for number in (1, 2)
    ],
    "groupLabels": {"alertname": "HostDown"},
    "commonLabels": {"alertname": "HostDown", "severity": "critical"},
    "commonAnnotations": {"runbook_url": "https://runbooks.example.org/HostDown"},
    "externalURL": "https://alertmanager.example.org",
    "version": "4",
    "groupKey": '{}:{alertname="HostDown"}',
    "truncatedAlerts": 0,
}
SOURCE = Source(
    "alertmanager",
    "Alertmanager",
    recognises,
    read,
    words,
    sample=SAMPLE,
    sample_headers={"User-Agent": "Alertmanager/0.27.0", "Content-Type": "application/json"},
)
