"""Hooks: making, seeing, changing and trying them. What their senders post comes by `webhooks.py`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired, Required, TypeVar
from urllib.parse import quote, unquote

from fastapi import Depends
from pydantic import BeforeValidator, ConfigDict, Field, with_config
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from flowbridge import sources
from flowbridge.auth import scopes
from flowbridge.auth.callers import Credential
from flowbridge.errors import Forbidden
from flowbridge.models.hooks import SCHEMES
from flowbridge.web.body import ForeignBody, JsonBody
from flowbridge.web.dependencies import ROOM, Caller, TheCore, segment
from flowbridge.web.endpoint import json_answer
from flowbridge.web.parameters import query
from flowbridge.web.public_url import public_url
from flowbridge.web.routes.deliveries import Id, Nothing, Time
from flowbridge.web.routing import Routes

Json = dict[str, Any]
T = TypeVar("T")

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # there are secrets in these answers

Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9._-]{0,63}$", examples=["alerts"])]
Scheme = Annotated[str, Field(json_schema_extra={"enum": list(SCHEMES)})]
Source = Annotated[str, Field(json_schema_extra={"enum": list(sources.NAMES)})]
Warnings = Annotated[list[str], Field(description="What is to be done, or known, beside it.")]


def _example(**body: Any) -> Callable[[type[T]], type[T]]:
    """One of a body, for the document."""
    return with_config(ConfigDict(json_schema_extra={"examples": [body]}))


class VerificationObject(TypedDict, total=False):
    scheme: Annotated[Scheme, Field(description="How its sender proves who it is; `token` by default.")]
    secret: Annotated[
        str,
        Field(description="16 to 1,000 characters of visible ASCII; without it one is made. No answer has it twice."),
    ]
    header: Annotated[str, Field(description="The header with the signature, for `hmac`.", examples=["X-Signature"])]
    prefix: Annotated[str, Field(description="What stands before the signature, for `hmac`.", examples=["sha256="])]
    encoding: Annotated[Literal["hex", "base64"], Field(description="Of the signature, for `hmac`.")]
    timestamp_header: Annotated[
        str, Field(description="The header with the time that is signed, too, for `hmac` and `grafana`.")
    ]


class HookDefinition(TypedDict, total=False):
    """What a hook is."""

    room: Required[
        Annotated[str, Field(description="Where its messages go: a room id, an alias, or a user id.", examples=[ROOM])]
    ]
    source: Annotated[Source, Field(description="Which tool it listens to; `auto` (default) tells it by the request.")]
    verification: VerificationObject
    template: Annotated[
        dict[str, str] | str,
        Field(
            description="Templates (minijinja) for members of a message: one of `text`, `markdown` and `html`, and "
            "others beside it. A string is one for `markdown`. Up to 16 KiB.",
            examples=[{"markdown": "**{{ payload.title }}** {{ payload.status }}", "key": "{{ payload.host }}"}],
        ),
    ]
    per: Annotated[Literal["notification", "alerts"], Field(description="One message for each of these.")]
    on_update: Annotated[
        Literal["edit", "thread", "reply", "new"],
        Field(description="What news of the same thing is to its first message; `edit` by default."),
    ]
    mention: Annotated[
        list[str],
        Field(
            description="Whom to ping when something begins to fire: user ids, `@room`.",
            examples=[["@oncall:example.org"]],
            max_length=50,
        ),
    ]
    mentions: Annotated[
        Literal["never", "firing", "template"], Field(description="Who may be pinged at all; `firing` by default.")
    ]
    ignore: Annotated[
        list[str],
        Field(
            description="The sender's names of events that are not shown: `issues`, or `issues.closed`. With a plus "
            "(`+issues.labeled`), one that is shown although its source leaves it out by default.",
            examples=[["push", "issues.closed", "+issues.labeled"]],
            max_length=100,
        ),
    ]
    keep_requests: Annotated[int, Field(ge=0, le=20, description="How many past requests are kept; 20 by default.")]


@_example(
    name="alerts",
    room=ROOM,
    source="grafana",
    verification={"scheme": "grafana"},
    mention=["@oncall:example.org"],
    ignore=["resolved"],
)
class NewHook(HookDefinition):
    name: Annotated[Name, Field(description="It stands in the hook's URL.")]


class TemplateFailure(TypedDict):
    time: NotRequired[Time]
    error: str


class SecretAge(TypedDict):
    created_at: Time
    until: NotRequired[Annotated[Time, Field(description="When it ends, since there is a newer one.")]]


class HookEntry(HookDefinition):
    name: Name
    fixed: Annotated[bool, Field(description="It stands in hooks.yaml, which alone can change it.")]
    hides_another: NotRequired[
        Annotated[bool, Field(description="The store has a hook of this name, too, which does not count.")]
    ]
    created_at: NotRequired[Time]
    changed_at: NotRequired[Time]
    used_at: NotRequired[Annotated[Time, Field(description="To the minute.")]]
    failure: NotRequired[
        Annotated[TemplateFailure, Field(description="How its template failed last, until it works again.")]
    ]


class HookObject(HookEntry):
    """A hook."""

    secrets: Annotated[list[SecretAge], Field(description="Those that hold, the newest first; not themselves.")]
    warnings: NotRequired[Warnings]


class HookWithSecret(HookObject):
    """The hook, with its secret: this once."""

    url: Annotated[str, Field(description="Where its sender POSTs to; it holds the secret where that is a token.")]
    secret: str
    curl: Annotated[str, Field(description="A line for a shell, to try it.")]


class HookList(TypedDict):
    """All hooks, by name."""

    hooks: list[HookEntry]
    warnings: NotRequired[Warnings]


class AnotherSecret(TypedDict, total=False):
    secret: Annotated[str, Field(description="Without it one is made.")]


class Tested(TypedDict):
    """It is stored, and will be in the room."""

    ok: Literal[True]
    source: str
    messages: Annotated[int, Field(ge=0)]
    delivery_id: NotRequired[Id]
    done: NotRequired[Annotated[str, Field(description="Why there was nothing to say.")]]
    warnings: Warnings


@_example(body={"job": "backup", "host": "db-1"}, template={"markdown": "**{{ payload.job }}** on {{ payload.host }}"})
class PreviewRequest(TypedDict, total=False):
    body: Annotated[Any, Field(description="A request's body: JSON, or a string with the text of one.")]
    headers: Annotated[dict[str, str], Field(examples=[{"X-GitHub-Event": "push"}])]
    request: Annotated[str, Field(description="The id of a kept request, instead of a body.")]
    template: Annotated[dict[str, str] | str, Field(description="To be tried instead of the hook's own.")]


class Preview(TypedDict):
    """What it would become."""

    source: Annotated[str, Field(description="Which it turned out to be.")]
    messages: Annotated[list[Json], Field(description="As people write them, their texts rendered.")]
    events: Annotated[list[Json], Field(description="Those of Matrix, `type` and `content`.")]
    key: Annotated[str, Field(description="What the first message is about, within the hook.")]
    state: Literal["", "firing", "resolved"]
    done: NotRequired[Annotated[str, Field(description="Why there is nothing to say.")]]
    warnings: Warnings


class KeptEntry(TypedDict):
    id: str
    received_at: Time
    size: Annotated[int, Field(description="Of its body, in bytes.")]
    is_cut: Annotated[bool, Field(description="Only 64 KiB of its body are kept.")]
    delivery_id: NotRequired[Id]
    source: NotRequired[str]
    event: NotRequired[Annotated[str, Field(description="The sender's name of what happened.")]]
    done: NotRequired[Annotated[str, Field(description="Why there was nothing to say.")]]
    error: NotRequired[Annotated[str, Field(description="Why it was refused.")]]
    warnings: NotRequired[Warnings]


class KeptRequests(TypedDict):
    """The last ones, the newest first."""

    requests: list[KeptEntry]


class KeptRequest(KeptEntry):
    """A request, without what its sender proved itself with."""

    headers: dict[str, str]
    body: str


routes = Routes("Hooks")


async def administrator(credential: Caller) -> Credential:
    """Raises Forbidden. Hooks act as the bot, in any room: who makes them may do all that keys may."""
    if credential.key is None:
        raise Forbidden(
            "hooks act as the bridge's bot, so a Matrix token may not administer them: use an API key with `admin` and "
            "no limits (`flowbridge keys create --admin` makes one)"
        )
    scopes.permit_all(credential.key)
    return credential


async def hook_name(raw: Annotated[str, segment("name", "The hook's name.", "alerts")]) -> str:
    return unquote(raw)


async def base(core: TheCore, request: Request) -> str:
    """The bridge's own address."""
    return public_url(core.settings, request)


Admin = Annotated[Credential, Depends(administrator)]
HookName = Annotated[str, Depends(hook_name)]
Base = Annotated[str, Depends(base)]
_MADE: Json = {
    "responses": {"201": {"headers": {"Location": {"schema": {"type": "string"}, "description": "The hook."}}}}
}


@routes.flow("POST", "/hooks", "create_hook", status=201, errors=[409], answers=HookWithSecret, extra=_MADE)
async def create(
    core: TheCore, admin: Admin, base: Base, body: Annotated[Json, Depends(ForeignBody(NewHook))]
) -> Response:
    """Make a hook

    Its URL, its secret and a line for a shell to try it are in this answer alone. Its template is tried on a request as
    its source sends them; a 400 names every problem. A room that the bot is not in is a warning.
    """
    made = await core.administration.create(body, base)
    return json_answer(made, 201, {"Location": f"/hooks/{quote(made['name'])}", **_HEADERS})


@routes.flow("GET", "/hooks", "hooks", answers=HookList)
async def index(core: TheCore, admin: Admin) -> Response:
    """All hooks

    Those of the store and of hooks.yaml, by name; without secrets and templates.
    """
    return json_answer(await core.administration.all(), headers=_HEADERS)


@routes.flow("GET", "/hooks/{name}", "hook", answers=HookObject)
async def show(core: TheCore, admin: Admin, name: HookName, base: Base) -> Response:
    """One hook

    Everything but its secrets: `rotate` makes a new one.
    """
    found = await core.administration.one(name)
    return json_answer({**found, "url": f"{base}/hooks/{name}"}, headers=_HEADERS)


@routes.flow("PUT", "/hooks/{name}", "replace_hook", errors=[409], answers=HookObject)
async def replace(
    core: TheCore, admin: Admin, name: HookName, base: Base, body: Annotated[Json, Depends(ForeignBody(HookDefinition))]
) -> Response:
    """Change a hook

    The whole definition is replaced; what `GET` shows of it can be given back. Its secrets stay; where the new scheme
    cannot use them, the answer has another one, and the old ones end.
    """
    return json_answer(await core.administration.replace(name, body, base), headers=_HEADERS)


@routes.flow("DELETE", "/hooks/{name}", "delete_hook", errors=[409], answers=Nothing)
async def remove(core: TheCore, admin: Admin, name: HookName) -> Response:
    """Delete a hook

    With its secrets and its kept requests. What it has sent stays.
    """
    await core.administration.remove(name)
    return json_answer({})


@routes.flow("POST", "/hooks/{name}/rotate", "rotate_hook", errors=[409], answers=HookWithSecret)
async def rotate(
    core: TheCore,
    admin: Admin,
    name: HookName,
    base: Base,
    body: Annotated[Json, Depends(ForeignBody(AnotherSecret))],
    now: Annotated[
        Literal["0", "1", "false", "true"],
        BeforeValidator(lambda text: text.strip().lower()),
        query("`1`: the old secrets end at once."),
    ] = "0",
) -> Response:
    """Give a hook a new secret

    The previous one stays valid for 7 days, time to change it at the sender; older ones end.
    """
    at_once = now in ("1", "true")
    return json_answer(await core.administration.rotate(name, body, base, now=at_once), headers=_HEADERS)


@routes.flow("POST", "/hooks/{name}/test", "test_hook", errors=[503], answers=Tested)
async def test(
    core: TheCore, admin: Admin, name: HookName, body: Annotated[Json, Depends(JsonBody(Nothing))]
) -> Response:
    """Send a test message of a hook

    That of a typical request of its source. It goes to the hook's room.
    """
    return json_answer(await core.administration.test(name), headers=_HEADERS)


@routes.flow("POST", "/hooks/{name}/preview", "preview_hook", answers=Preview)
async def preview(
    core: TheCore, admin: Admin, name: HookName, body: Annotated[Json, Depends(ForeignBody(PreviewRequest))]
) -> Response:
    """Preview what a request to a hook would become

    A body, or a kept request. Nothing is sent. A template that fails is a 400 here; a sender's request is then sent as
    a summary.
    """
    return json_answer(await core.administration.preview(name, body), headers=_HEADERS)


@routes.flow("GET", "/hooks/{name}/requests", "hook_requests", answers=KeptRequests)
async def requests(core: TheCore, admin: Admin, name: HookName) -> Response:
    """The last requests of a hook

    Up to 20 (`keep_requests`) whose sender was known, and what was done with them.
    """
    return json_answer(await core.administration.requests(name), headers=_HEADERS)


@routes.flow("GET", "/hooks/{name}/requests/{id}", "hook_request", answers=KeptRequest)
async def request(
    core: TheCore, admin: Admin, name: HookName, id_: Annotated[str, segment("id", "As the list has it.", "17")]
) -> Response:
    """One of the last requests of a hook"""
    return json_answer(await core.administration.request(name, unquote(id_)), headers=_HEADERS)
