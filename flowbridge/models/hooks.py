"""Hooks: addresses to which other tools POST what they have to report (contract §6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowbridge.models import Rendered

Per = Literal["notification", "alerts"]
OnUpdate = Literal["edit", "thread", "reply", "new"]
Mentions = Literal["never", "firing", "template"]

KEPT_REQUESTS = 20
OWNER = "hook:"
TEMPLATE_FAILED = "the template failed"  # the beginning of what its owner is told then
TOKEN = "token"  # noqa: S105 (the scheme's name): what stands in the path, or in a header as it is
SCHEMES = (  # hooks/signatures.py has what they mean
    TOKEN,
    *("github", "gitlab", "gitea", "grafana", "slack", "stripe", "pagerduty", "sentry", "standard-webhooks", "hmac"),
)


@dataclass(frozen=True, slots=True)
class Verification:
    """How a hook knows its sender. `scheme`: a name of `hooks/signatures.py`; what else there is belongs to `hmac`."""

    scheme: str = TOKEN
    header: str = ""
    prefix: str = ""
    encoding: Literal["hex", "base64"] = "hex"
    timestamp_header: str = ""


@dataclass(frozen=True, slots=True)
class Hook:
    """A hook without its secrets.

    `source`: a name of `sources/`, or `auto`. `template`: templates for members of a message (`text`, `markdown` or
    `html` among them); empty: the source's own. `mention`: user ids and `@room`, for what begins to fire; `mentions`:
    who may be pinged at all. `ignore`: the sender's names of events that are not shown, or, with a + in front, of quiet
    ones that are. `keep_requests`: how many past requests are kept. `is_fixed`: it comes from hooks.yaml, which alone
    can change it.
    """

    name: str
    room: str
    source: str = "auto"
    verification: Verification = Verification()
    template: Mapping[str, str] | None = None
    per: Per = "notification"
    on_update: OnUpdate = "edit"
    mention: tuple[str, ...] = ()
    mentions: Mentions = "firing"
    ignore: tuple[str, ...] = ()
    keep_requests: int = KEPT_REQUESTS
    is_fixed: bool = False

    @property
    def owner(self) -> str:
        """What stands for it where events name an API key: a hook is a caller like others."""
        return owner(self.name)


def owner(name: str) -> str:
    """No API key has such an id."""
    return f"{OWNER}{name}"


@dataclass(frozen=True, slots=True)
class Said:
    """A message that a request to a hook became. `members`: of contract §5, but for its text, which is rendered.

    The others: see `sources.source.Notice`. `digest`: of what makes it the same as another one of its story.
    """

    members: Mapping[str, Any]
    rendered: Rendered
    event: str = ""
    key: str = ""
    state: str = ""
    firing: tuple[str, ...] = ()
    ended: tuple[str, ...] | None = None
    time: int | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """What a request to a hook became. `source`: which it turned out to be. `delivery_id`: the sender's, if any.

    `nothing`: why there is no message, as a clause. `warnings`: what went wrong, for the hook's owner; a summary was
    made instead.
    """

    source: str
    messages: tuple[Said, ...] = ()
    event: str = ""
    delivery_id: str = ""
    nothing: str = ""
    warnings: tuple[str, ...] = ()
