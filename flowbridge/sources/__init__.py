"""What other tools' webhooks mean: one file per source. Runs in the render process."""

from typing import Any

from flowbridge.sources import (
    alertmanager,
    cloudevents,
    discord,
    generic,
    gitea,
    github,
    gitlab,
    gotify,
    grafana,
    ntfy,
    pagerduty,
    sentry,
    slack,
    sns,
    teams,
    uptime_kuma,
)
from flowbridge.sources.source import Headers, Source

# In the order in which `auto` asks them: Forgejo and Gitea send GitHub's headers beside their own.
SOURCES: tuple[Source, ...] = (
    gitea.FORGEJO,
    gitea.SOURCE,
    github.SOURCE,
    gitlab.SOURCE,
    cloudevents.SOURCE,  # its headers, or four keys that it requires, say so
    sns.SOURCE,
    sentry.SOURCE,
    pagerduty.SOURCE,
    uptime_kuma.SOURCE,
    grafana.SOURCE,  # its groups are Alertmanager's, and more
    alertmanager.SOURCE,
    teams.SOURCE,
    discord.SOURCE,
    slack.SOURCE,
    ntfy.SOURCE,
    gotify.SOURCE,
    generic.SOURCE,
)
AUTO = "auto"
BY_NAME = {source.name: source for source in SOURCES}
NAMES = (AUTO, *sorted(BY_NAME))


def find(name: str, headers: Headers, payload: Any) -> Source:
    """The source of a request to a hook that has this one."""
    if name != AUTO:
        return BY_NAME[name]
    return next((source for source in SOURCES if source.recognises(headers, payload)), generic.SOURCE)
