"""What a source is: how the tools that send webhooks say what has happened. Pure.

A source is one file: how its messages look, and a few lines that read what a request is about. It runs in the render
process, since what others send is as hostile as any Markdown, so it may raise nothing but `UnrecognisedError`, must
take any JSON (nulls, other types than documented, no keys at all), and its time must be linear in the body.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flowbridge.models.hooks import Per

Json = dict[str, Any]
Headers = Mapping[str, str]
State = Literal["", "firing", "resolved"]


class UnrecognisedError(ValueError):
    """The body is not what this source sends, as a clause. In a chat dialect that is a 400; else a summary is sent."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request: its JSON, or its text; its headers by lower-case name, without secrets; what the hook wants of it."""

    payload: Any
    headers: Headers = field(default_factory=dict)
    per: Per = "notification"


@dataclass(frozen=True, slots=True)
class Notice:
    """One message to be made of a request.

    `view`: what the template sees, beside `payload`, `headers`, `source`, `event`, `key` and `state`. `message`:
    members of a message (contract §5); with a text or files among them, no template of the source is used.
    `event`: the sender's name of what happened, with its action behind a dot (`issues.opened`): `ignore` of a hook
    lists these, with or without the action.

    The story that it belongs to, if any: `key` is its name within the hook, `state` how it goes, `firing` what of it
    fires (ids; a story without parts has `("",)`), `time` the sender's own time of it (ms since 1970). `ended`: ids of
    what does not fire any more, where the sender lists that, too; else None. `same`: two notices of a story with an
    equal `same` (JSON) say nothing new; without it their texts are compared.

    `outcome`: how what the event reports has ended, where its name does not say so: `ignore` may have it behind the
    event, as `workflow_run.completed.success`. `is_quiet`: it is shown only if the hook's `ignore` says `+EVENT`.
    """

    event: str = ""
    view: Json = field(default_factory=dict)
    message: Json | None = None
    key: str = ""
    state: State = ""
    firing: tuple[str, ...] = ()
    ended: tuple[str, ...] | None = None
    time: int | None = None
    same: Any = None
    outcome: str = ""
    is_quiet: bool = False


@dataclass(frozen=True, slots=True)
class Nothing:
    """A request that is right and shows nothing: a ping. `reason`: a clause, for its sender: "a ping"."""

    reason: str
    event: str = ""


Markdown = Callable[[str], str]  # what people wrote in Markdown, as HTML
Words = Callable[[Json, Markdown], str]
Read = Callable[[Incoming], Sequence[Notice] | Nothing]


def _no_id(headers: Headers, payload: Any) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Source:
    """`name`: as hooks name it. `title`: as its makers write it.

    `recognises`: whether a request is of this source, by what no other source has. `read`: the notices of a request.
    `template`: HTML for its notices, as minijinja, or as a function of what a template sees; `text_of` of it is the
    body. `delivery_id`: the sender's own id of this delivery, if it has one: the same again is a repeat. `scheme`: how
    its sender signs, if it does. `dialect`: a body that is not recognised is refused. `sample`: a body as it sends one,
    for `hooks test`; `sample_headers`: what comes with it.
    """

    name: str
    title: str
    recognises: Callable[[Headers, Any], bool]
    read: Read
    template: str | Words = ""
    delivery_id: Callable[[Headers, Any], str] = _no_id
    scheme: str = "token"
    dialect: bool = False
    sample: Any = None
    sample_headers: Headers = field(default_factory=dict)
