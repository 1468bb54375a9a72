"""A group of alerts, as Alertmanager and Grafana report it. Pure, in linear time."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowbridge.models.hooks import Per
from flowbridge.sources.reading import at, items, moment, text
from flowbridge.sources.report import FIRING, MAX_PARTS, RESOLVED, Pairs, report, web
from flowbridge.sources.source import Json, Nothing, Notice, State, UnrecognisedError

MAX_FINGERPRINT = 40  # characters: Alertmanager's and Grafana's have 16
MAX_ALONE = 50  # alerts with a message each; a group of more is one message all the same, so that none is lost
_TEXTS = ("summary", "description", "message")
_LINKS = {  # annotations; by the names that mixins and Grafana's editor use
    "runbook_url": "Runbook",
    "runbook": "Runbook",
    "dashboard_url": "Dashboard",
    "dashboard": "Dashboard",
}
_NAMES = {"grafana_folder": "folder"}
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Alert:
    """One of a group. `labels`, `annotations`: those that a person reads; `links`: to where more is.

    `values`: what was measured, in a few words.
    """

    id: str
    is_firing: bool
    labels: dict[str, str]
    annotations: dict[str, str]
    started: Any
    ended: Any  # None while it fires
    links: tuple[Pair, ...]
    values: str = ""

    @classmethod
    def read(cls, alert: Mapping[str, Any], status: str, links: Pairs, values: str = "") -> "Alert":
        """`status`: of the group, for an alert without one of its own."""
        is_firing = (text(alert, "status") or status) != "resolved"
        labels = _texts(alert.get("labels"))
        annotations = _texts(alert.get("annotations"))
        urls = {name: value for name, value in annotations.items() if web(value)}
        started = text(alert, "startsAt")
        # Older versions know no fingerprint. An alert that began again is another one: a receiver without send_resolved
        # hears of its second beginning alone.
        name = text(alert, "fingerprint")
        if not name or len(name) > MAX_FINGERPRINT:
            name = _digest(name, *map(str, sorted(labels.items())))
        at = moment(started)
        return cls(
            f"{name}-{_digest(started)[:8] if at is None else at}",
            is_firing,
            labels,
            _without(annotations, urls) if urls else annotations,
            started,
            None if is_firing else text(alert, "endsAt"),  # what fires may have a time at which it would end unrenewed
            tuple(dict.fromkeys((*((_LINKS.get(name, name), url) for name, url in urls.items()), *links))),
            values,
        )

    @property
    def time(self) -> int | None:
        """When it was last heard of, by its sender's clock."""
        return max((at for at in (moment(self.started), moment(self.ended)) if at is not None), default=None)

    @property
    def same(self) -> list[Any]:
        """What makes it say something new. No URL: each of two Alertmanagers, or Prometheuses, names itself."""
        return [self.id, self.is_firing, sorted(self.annotations.items()), self.values]


def _group_key(payload: Any) -> str:
    """The group's key; tools that only speak Alertmanager's body may not send one."""
    labels = _texts(at(payload, "groupLabels"))
    key = text(payload, "groupKey")
    return key or (f"{text(payload, 'receiver')}:{sorted(labels.items())}" if labels else "")


def notices(
    payload: Any, alerts: Sequence[Alert], per: Per, *, title: str = "", message: str = "", links: Pairs = ()
) -> Sequence[Notice] | Nothing:
    """What a group says, or each alert of it. `title`, `message`: where the tool's owner has worded them."""
    if not alerts:
        if items(payload, "alerts"):
            raise UnrecognisedError("its alerts are no objects")
        return Nothing("a notification without alerts", text(payload, "status"))
    if per == "alerts" and len(alerts) <= MAX_ALONE:
        return [_notice([alert], alert.id, links=links) for alert in alerts]
    truncated = at(payload, "truncatedAlerts")
    left_out = truncated if isinstance(truncated, int) else 0
    return [_notice(alerts, _group_key(payload), title=title, message=message, links=links, left_out=left_out)]


def _notice(alerts: Sequence[Alert], key: str, *, title: str = "", message: str = "", **more: Any) -> Notice:
    firing = [alert for alert in alerts if alert.is_firing]
    resolved = [alert for alert in alerts if not alert.is_firing]
    state: State = "firing" if firing else "resolved"
    return Notice(
        event=state,
        view={"report": _report([*firing, *resolved], len(firing), len(resolved), title, message, **more)},
        key=key,
        state=state,
        firing=tuple(dict.fromkeys(alert.id for alert in firing)),
        ended=tuple(dict.fromkeys(alert.id for alert in resolved)),
        time=max((time for alert in alerts if (time := alert.time) is not None), default=None),
        same=[title, message, *sorted(alert.same for alert in alerts)],
    )


def _report(
    alerts: Sequence[Alert], firing: int, resolved: int, title: str, message: str, links: Pairs = (), left_out: int = 0
) -> Json:
    mark = FIRING if firing else RESOLVED
    if len(alerts) == 1:
        (alert,) = alerts
        return report(
            title or alert.labels.get("alertname", "Alert"),
            mark=mark,
            outcome="firing" if firing else "resolved",
            text=message or _text(alert.annotations),
            facts=[*_facts(alert.labels, alert.annotations), ("value", alert.values)],
            since=alert.started,
            until=alert.ended,
            links=(*alert.links, *links),
            more=_left_out(left_out),
        )
    labels = _common([alert.labels for alert in alerts])
    annotations = _common([alert.annotations for alert in alerts])
    shared = _common([dict.fromkeys(alert.links, "") for alert in alerts])
    return report(
        title or labels.get("alertname") or _names(alerts),
        mark=mark,
        outcome=", ".join([f"firing {firing}"] * bool(firing) + [f"resolved {resolved}"] * bool(resolved)),
        text=message or _text(annotations),
        facts=_facts(labels, annotations),
        links=(*shared, *links),
        parts=[
            _part(alert, labels, annotations, shared, is_mixed=bool(firing and resolved))
            for alert in alerts[:MAX_PARTS]
        ],
        more=_left_out(left_out) or (f"… and {len(alerts) - MAX_PARTS} more" if len(alerts) > MAX_PARTS else ""),
    )


def _part(
    alert: Alert,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    links: Mapping[Pair, str],
    *,
    is_mixed: bool,
) -> Json:
    """One of several: what it does not have in common with the others."""
    own = _without(alert.annotations, annotations)
    differing = _without(alert.labels, labels)
    alertname = differing.pop("alertname", "")
    title = next((own.pop(name) for name in _TEXTS if name in own), "")
    if not title and alertname:
        title, alertname = alertname, ""
    elif not title and differing:
        name = "instance" if "instance" in differing else next(iter(differing))
        title = f"{name}: {differing.pop(name)}"
    return report(
        title or alert.labels.get("alertname", "Alert"),
        mark=(FIRING if alert.is_firing else RESOLVED) if is_mixed else "",
        text=_text(own),
        facts=[("alert", alertname), *_facts(differing, own), ("value", alert.values)],
        since=alert.started,
        until=alert.ended,
        links=[link for link in alert.links if link not in links],
    )


def _facts(labels: Mapping[str, str], annotations: Mapping[str, str]) -> list[Pair]:
    facts = {_NAMES.get(name, name): value for name, value in labels.items() if name != "alertname"}
    return list((facts | {name: value for name, value in annotations.items() if name not in _TEXTS}).items())


def _text(annotations: Mapping[str, str]) -> str:
    return "\n".join(dict.fromkeys(annotations[name].strip() for name in _TEXTS if name in annotations))


def _names(alerts: Sequence[Alert]) -> str:
    names = list(dict.fromkeys(alert.labels.get("alertname", "") for alert in alerts if alert.labels.get("alertname")))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "Alerts"


def _left_out(number: int) -> str:
    return f"… and {number} more, which were left out by the sender" if number > 0 else ""


def _texts(value: Any) -> dict[str, str]:
    """Its texts, without what tools keep for themselves (`__alert_rule_uid__`)."""
    if not isinstance(value, dict):
        return {}
    shown = ((name, each if isinstance(each, str) else text(each)) for name, each in value.items() if name[:2] != "__")
    return {name: found for name, found in shown if found and not found.isspace()}


def _common(each: Sequence[dict[Any, str]]) -> dict[Any, str]:
    """What all of them have, and have alike."""
    first, *others = each
    found = dict(first)
    for other in others:
        found = {name: value for name, value in found.items() if other.get(name) == value}
    return found


def _without(values: Mapping[str, str], common: Collection[str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if name not in common}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]
