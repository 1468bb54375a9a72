"""Making, seeing, changing and trying hooks: for HTTP and for the command line, beside a running bridge, too."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy import Connection

from flowbridge import log
from flowbridge.errors import BadContent, Errcode, MatrixError, NotFound, Problem, WrongState
from flowbridge.hooks import definition, file, secrets, trying
from flowbridge.hooks.body import Body
from flowbridge.hooks.definition import RULE, Definition
from flowbridge.hooks.receiving import Done, Receiving, without_secrets
from flowbridge.hooks.registry import Registry
from flowbridge.hooks.requests import Request, Requests
from flowbridge.models.hooks import TEMPLATE_FAILED, TOKEN, Hook, Made
from flowbridge.rendering.processes import Rendering
from flowbridge.services.delivery_views import iso, without_none
from flowbridge.services.media.attachment import essence
from flowbridge.settings import SettingsError
from flowbridge.store import Database, clock, hooks
from flowbridge.store.hooks import Entry, State, StoredSecret

Json = dict[str, Any]

OLD_SECRET_MS = 7 * 86_400_000  # for which a secret holds beside the one that replaces it
SHOWN = ("fixed", "hides_another", "created_at", "changed_at", "used_at", "failure", "secrets", "url", "warnings")
PREVIEW_KEYS = ("body", "headers", "request", "template")

_TAKEN = "is the token of another hook: a token says which hook it is"


class Administration:
    """For one event loop. `standing`: what keeps the bot from sending to a room, as a sentence; "" when nothing does.

    `limit`: of a body, in bytes.
    """

    def __init__(
        self,
        database: Database,
        registry: Registry,
        requests: Requests,
        rendering: Rendering,
        receiving: Receiving,
        *,
        standing: Callable[[str], Awaitable[str]],
        limit: int,
    ) -> None:
        self._database = database
        self._registry = registry
        self._requests = requests
        self._rendering = rendering
        self._receiving = receiving
        self._standing = standing
        self._limit = limit

    # which there are

    async def all(self) -> Json:
        """Every hook, by name, without its template."""
        await self._refresh()
        entries, states = await self._database.read(_all)
        stored = {entry.hook.name: entry for entry in entries}
        names = sorted(stored.keys() | self._registry.fixed.keys())
        found = [self._view(name, stored.get(name), states.get(name, State())) for name in names]
        for each in found:
            each.pop("template", None)
        answer: Json = {"hooks": found}
        if self._registry.trouble:
            answer["warnings"] = [self._registry.trouble]
        return answer

    async def one(self, name: str) -> Json:
        """All that is known of a hook, but its secrets. Raises NotFound."""
        _check_name(name)
        await self._refresh()
        entry, state, kept = await self._database.read(partial(_one, name=name, now=clock.now_ms()))
        if entry is None and name not in self._registry.fixed:
            raise not_found(name)
        if (fixed := self._registry.fixed.get(name)) is not None and fixed.secrets:
            kept = []  # the file's count
        found = [without_none({"created_at": iso(each.created_at), "until": iso(each.until)}) for each in kept]
        return {**self._view(name, entry, state), "secrets": found}

    async def _refresh(self) -> None:
        """With what was noted so far."""
        await self._registry.flush()
        await self._registry.refresh()

    def _view(self, name: str, entry: Entry | None, state: State) -> Json:
        fixed = self._registry.fixed.get(name)
        hook = fixed.hook if fixed is not None else entry.hook if entry is not None else None
        assert hook is not None
        failure = self._registry.failing.get(name) if name in self._registry.failing else state.failure
        shown = {
            **definition.to_json(hook),
            "fixed": hook.is_fixed,
            "hides_another": True if fixed is not None and entry is not None else None,
            "created_at": iso(entry.created_at) if fixed is None and entry is not None else None,
            "changed_at": iso(entry.changed_at) if fixed is None and entry is not None else None,
            "used_at": iso(state.used_at),
            "failure": without_none({"time": iso(state.failed_at), "error": failure}) if failure else None,
        }
        return without_none(shown)

    # making and changing them

    async def create(self, value: Any, base: str) -> Json:
        """Make a hook. No later answer has its secret. Raises BadContent; WrongState where there is one already."""
        found = definition.read(value)
        hook = found.hook
        if hook.name in self._registry.fixed:
            raise WrongState(f"{self._file} has a hook {hook.name}, and alone can change it")
        warnings = await self._check(hook)
        secret = found.secrets[0] if found.secrets else secrets.new(hook.verification.scheme)
        kept = secrets.sealed(secret, hook.verification.scheme, self._registry.fernet)
        await self._requests.flush()  # of an earlier hook of this name: then they go
        outcome = await self._database.run(partial(hooks.add, hook=hook, secret=kept, now=clock.now_ms()))
        if outcome == "exists":
            raise WrongState(
                f"there is a hook {hook.name} already: PUT /hooks/{hook.name} changes it, and so does "
                f"`flowbridge hooks create {hook.name} … --replace`"
            )
        if outcome == "full":
            raise WrongState(f"there are {hooks.MAX_HOOKS} hooks, and can be no more: delete one that is not used")
        if outcome == "taken":
            raise _problem("/verification/secret", _TAKEN)
        log.info("hook_created", hook=hook.name, room=hook.room, source=hook.source)
        warnings += await self._room_warnings(hook)
        return {**await self.one(hook.name), **_secret(base, hook, secret), "warnings": warnings}

    async def replace(self, name: str, value: Mapping[str, Any], base: str) -> Json:
        """Give a hook another definition. It keeps its secrets, unless its new scheme cannot use them.

        What is only shown of one is left out of account: what `one` answers can be changed and given back.

        Raises BadContent, NotFound, and WrongState for one of hooks.yaml.
        """
        before = await self._own(name)
        found = definition.read({key: item for key, item in value.items() if key not in SHOWN}, name=name)
        hook = found.hook
        warnings = await self._check(hook)
        was, scheme = before.hook.verification.scheme, hook.verification.scheme
        needs_another = _form(was) != _form(scheme)
        if found.secrets and not needs_another:
            raise _problem("/verification/secret", f"stays as it is here: POST /hooks/{name}/rotate takes another one")
        secret = ""
        kept = None
        if needs_another:  # those that it has would be of no use
            secret = found.secrets[0] if found.secrets else secrets.new(scheme)
            kept = secrets.sealed(secret, scheme, self._registry.fernet)
        work = partial(hooks.replace, hook=hook, now=clock.now_ms(), secret=kept)
        outcome = await self._database.run(work)
        if outcome == "absent":
            raise not_found(name)
        if outcome == "taken":
            raise _problem("/verification/secret", _TAKEN)
        log.info("hook_changed", hook=name)
        warnings += await self._room_warnings(hook)
        shown = _secret(base, hook, secret) if needs_another else {}
        return {**await self.one(name), **shown, "warnings": warnings}

    async def rotate(self, name: str, value: Any, base: str, *, now: bool = False) -> Json:
        """Give a hook another secret; the one before it holds for 7 days more, or (`now`) no longer.

        Raises BadContent, NotFound, and WrongState where hooks.yaml has its secret.
        """
        hook = await self._any(name)
        if hook.is_fixed and self._registry.fixed[name].secrets:
            raise WrongState(f"{self._file} has the secret of the hook {name}, and alone can change it")
        if problems := definition.unknown(value, ("secret",)):
            raise BadContent(problems)
        scheme = hook.verification.scheme
        given = value.get("secret")
        secret = secrets.new(scheme) if given is None else given
        if not isinstance(secret, str) or (wrong := secrets.problem(secret, scheme)):
            raise _problem("/secret", wrong if isinstance(secret, str) else "must be a string")
        await self._rotate(hook, secret, now=now)
        return {**await self.one(name), **_secret(base, hook, secret)}

    async def _rotate(self, hook: Hook, secret: str, *, now: bool) -> None:
        kept = secrets.sealed(secret, hook.verification.scheme, self._registry.fernet)
        at = clock.now_ms()
        until = at if now else at + OLD_SECRET_MS
        work = partial(hooks.rotate, name=hook.name, secret=kept, now=at, until=until)
        if not await self._database.run(work):
            raise _problem("/secret", f"{_TAKEN}, or this one's already")
        await self._registry.refresh()
        log.info("hook_rotated", hook=hook.name)

    async def remove(self, name: str) -> None:
        """Delete a hook with its secrets, its state and its requests. Raises NotFound, and WrongState as `replace`."""
        await self._own(name)
        await self._requests.flush()  # none of its requests may be written after it is gone
        if not await self._database.run(partial(hooks.remove, name=name)):
            raise not_found(name)
        await self._registry.refresh()
        log.info("hook_deleted", hook=name)

    async def _check(self, hook: Hook) -> list[str]:
        """What is to be said of its template. Raises BadContent."""
        if not hook.template:
            return []
        problems, warnings = await self._rendering.check_template(hook.source, hook.template, hook.per)
        if problems:
            raise BadContent([replace(problem, schema=RULE) for problem in problems])
        return warnings

    async def _room_warnings(self, hook: Hook) -> list[str]:
        return [warning] if (warning := await self._standing(hook.room)) else []

    # trying them

    async def test(self, name: str) -> Json:
        """Send the message of a request as the hook's source sends it. Raises NotFound, and what a sender would get."""
        done = await self.send_sample(name)
        answer: Json = {"ok": True, "source": done.source, "messages": done.messages}
        answer |= {"delivery_id": done.delivery} if done.delivery else {}
        return answer | ({"done": done.why} if done.why else {}) | {"warnings": list(done.warnings)}

    async def send_sample(self, name: str) -> Done:
        hook = await self._any(name)
        raw, headers = trying.sample(hook)
        return await self._receiving.receive(hook, headers, raw, self._limit, is_test=True)

    async def preview(self, name: str, value: Any) -> Json:
        """What a request would become: `{"body", "headers"?}` or `{"request": id}`, with another `template`, perhaps.

        Raises BadContent, also where the template fails; NotFound.
        """
        hook = await self._any(name)
        if not isinstance(value, Mapping):
            raise _problem("", 'must be an object: {"body": …} or {"request": id}')
        problems = definition.unknown(value, PREVIEW_KEYS)
        if ("body" in value) == ("request" in value):
            problems.append(Problem("", "needs one of body and request (the id of a kept request)", RULE))
        if problems:
            raise BadContent(problems)
        if "template" in value:
            hook = definition.read({**definition.to_json(hook), "template": value["template"]}).hook
            await self._check(hook)
        body, headers = await self._given(hook.name, value)
        made = await self._receiving.make(hook, body, headers)
        if hook.template and (failed := [text for text in made.warnings if text.startswith(TEMPLATE_FAILED)]):
            raise _problem("/template", f"fails here: {failed[0].partition('sent: ')[2] or failed[0]}")
        return self._previewed(hook, made)

    def _previewed(self, hook: Hook, made: Made) -> Json:
        planned = self._receiving.plan(hook, made)
        first = made.messages[0] if made.messages else None
        messages = [
            without_none({**said.members, "text": said.rendered.body, "html": said.rendered.html, "event": said.event})
            for said in made.messages
        ]
        answer: Json = {
            "source": made.source,
            "messages": messages,
            "events": [{"type": each.type, "content": dict(each.content)} for each in planned.shaped],
            "key": first.key if first else "",
            "state": first.state if first else "",
            "warnings": [*made.warnings, *planned.warnings],
        }
        nothing = made.nothing or ("" if planned.shaped else f"{made.event or 'this event'} is ignored")
        return {**answer, "done": nothing} if nothing else answer

    async def _given(self, name: str, value: Mapping[str, Any]) -> tuple[Body, Mapping[str, str]]:
        if "request" in value:
            id_ = value["request"]
            if not isinstance(id_, str | int):
                raise _problem("/request", "must be the id of a kept request")
            found = await self._kept(name, str(id_))
            if found.is_text:
                return Body(found.body, "text"), found.headers
            may_be_text = found.is_cut or essence(found.headers.get("content-type", "")) == "text/plain"
            return Body(found.body, "either" if may_be_text else "json"), found.headers
        headers = value.get("headers", {})
        if not isinstance(headers, Mapping) or not all(isinstance(each, str) for each in headers.values()):
            raise _problem("/headers", "must be an object of strings")
        return _body(value["body"]), without_secrets({key.lower(): each for key, each in headers.items()})

    # what they were sent

    async def requests(self, name: str) -> Json:
        """The kept requests of a hook, the newest first, without their bodies. Raises NotFound."""
        await self._any(name)
        return {"requests": [_summary(each) for each in await self._requests.of(name)]}

    async def request(self, name: str, id_: str) -> Json:
        """Raises NotFound."""
        await self._any(name)
        found = await self._kept(name, id_)
        return {**_summary(found), "headers": dict(found.headers), "body": found.body}

    async def _kept(self, name: str, id_: str) -> Request:
        found = await self._requests.one(name, id_)
        if found is None:
            raise NotFound(f"the hook {name} has no such request: the last ones are kept", errcode=Errcode.NOT_FOUND)
        return found

    # hooks.yaml

    async def check_file(self, fixed: Mapping[str, Definition]) -> None:
        """Raises SettingsError for a template that does not work."""
        for name, each in fixed.items():
            try:
                await self._check(each.hook)
            except BadContent as error:
                wrong = "; ".join(f"{problem.pointer} {problem.message}" for problem in error.problems)
                raise SettingsError(f"{file.NAME}: {self._file}: the hook {name}: {wrong}") from None

    async def reload(self) -> None:
        """Read hooks.yaml again. Where it cannot be used, what was read before holds."""
        if self._registry.path is None:
            return
        try:
            found = await asyncio.to_thread(self._registry.load)
            await self.check_file(found)
        except SettingsError as error:
            self._registry.keep(error)
        except MatrixError as error:  # too many texts are being rendered
            self._registry.keep(SettingsError(f"{file.NAME}: it cannot be checked: {error.error}"))
        else:
            self._registry.take(found)

    @property
    def _file(self) -> str:
        return str(self._registry.path)

    async def _any(self, name: str) -> Hook:
        """Raises NotFound, or Unavailable."""
        _check_name(name)
        if (found := self._registry.hook(name)) is None:
            await self._registry.refresh()
            found = self._registry.hook(name)
        if found is None:
            raise not_found(name)
        return found

    async def _own(self, name: str) -> Entry:
        """A hook of the store. Raises NotFound, and WrongState for one of hooks.yaml."""
        _check_name(name)
        if name in self._registry.fixed:
            raise WrongState(f"the hook {name} stands in {self._file}, which alone can change it")
        found = await self._database.read(partial(hooks.get, name=name))
        if found is None:
            raise not_found(name)
        return found


def _check_name(name: str) -> None:
    """Raises NotFound for what no hook is called: not every text may go into a statement."""
    if not definition.NAME.fullmatch(name):
        raise not_found(name)


def not_found(name: str) -> NotFound:
    shown = name[:80] if name.isprintable() else repr(name[:80])
    return NotFound(f"there is no hook {shown}", errcode=Errcode.NOT_FOUND)


def _all(connection: Connection) -> tuple[list[Entry], dict[str, State]]:
    return hooks.every(connection), hooks.states(connection)


def _one(connection: Connection, name: str, now: int) -> tuple[Entry | None, State, list[StoredSecret]]:
    return hooks.get(connection, name), hooks.state(connection, name), hooks.secrets(connection, now, name)


def _secret(base: str, hook: Hook, secret: str) -> Json:
    """What is shown once."""
    return {"url": trying.url(base, hook, secret), "secret": secret, "curl": trying.curl(base, hook, secret)}


def _summary(request: Request) -> Json:
    return {
        "id": request.id,
        "received_at": iso(request.received_at),
        "size": request.size,
        "is_cut": request.is_cut,
        **request.outcome,
    }


def _body(value: Any) -> Body:
    """A text is a body as it comes; anything else is its JSON."""
    if isinstance(value, str):
        return Body(value, "either" if value.lstrip()[:1] in ("{", "[", '"') else "text")
    return Body(json.dumps(value), "json")


def _form(scheme: str) -> str:
    """Schemes of one form can use each other's secrets."""
    return scheme if scheme in (TOKEN, secrets.STANDARD) else "text"


def _problem(at: str, message: str) -> BadContent:
    return BadContent([Problem(at, message, RULE)])
