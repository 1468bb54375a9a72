"""`flowbridge hooks`: make, see, try and delete hooks in the store, also beside a running `serve`."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flowbridge import log
from flowbridge.auth.tokens import cipher
from flowbridge.bridge import Core
from flowbridge.cli import FAILED, UNUSABLE, Usage, hooks_shown
from flowbridge.cli.send import bot_core, through_the_store
from flowbridge.cli.terminal import as_text, note, printable, say
from flowbridge.errors import BadContent, MatrixError, Problem
from flowbridge.services.sending import Told
from flowbridge.settings import Settings
from flowbridge.store import delivery_log
from flowbridge.store.engine import place

Json = dict[str, Any]
Use = Callable[[Core], Coroutine[Any, Any, Any]]

STDIN = "-"
MAX_BYTES = 2 * 1024 * 1024  # of a file that is read
POLL_SECONDS = 0.2  # between two looks at what became of a test

_OPTIONS = {
    "/name": "NAME",
    "/verification/secret": "--secret-file",
    "/secret": "--secret-file",
    "/template": "--template",
    "/keep_requests": "--keep-requests",
    "/on_update": "--on-update",
    "/body": "the body",
    "/request": "--request",
}
_FORMATS = {".html": "html", ".htm": "html", ".txt": "text"}  # any other is Markdown
_OF_TEMPLATES = (".j2", ".jinja", ".jinja2")


def create(
    settings: Settings, given: Mapping[str, Any], template: Path | None, secret_file: Path | None, *, replace: bool
) -> int:
    """Make a hook, or change one. Prints its URL, alone on a line, then a line for a shell to try it."""
    value = {name: item for name, item in given.items() if item not in (None, "", [])}
    verification = {name: item for name, item in value.pop("verification", {}).items() if item}
    if secret_file is not None:
        verification["secret"] = _read(secret_file, "--secret-file").strip()
    if verification:
        value["verification"] = verification
    if template is not None:
        value["template"] = _template(template)

    async def use(core: Core) -> Json:
        base = hooks_shown.base(settings)
        if replace:
            return await core.administration.replace(as_text(str(value["name"])), value, base)
        return await core.administration.create(value, base)

    told = partial(hooks_shown.made, settings=settings, verb="changed" if replace else "made")
    return _run(settings, use, told, code=UNUSABLE, tells=True)


def rotate(settings: Settings, name: str, secret_file: Path | None, *, now: bool) -> int:
    """Give a hook another secret. Prints as `create` does."""
    value = {} if secret_file is None else {"secret": _read(secret_file, "--secret-file").strip()}
    use = partial(_rotate, name=as_text(name), value=value, base=hooks_shown.base(settings), now=now)
    return _run(settings, use, partial(hooks_shown.rotated, settings=settings), code=UNUSABLE, tells=True)


async def _rotate(core: Core, name: str, value: Json, base: str, *, now: bool) -> Json:
    return await core.administration.rotate(name, value, base, now=now)


def show_all(settings: Settings, *, in_json: bool) -> int:
    """Print all hooks by name, without secrets."""

    async def use(core: Core) -> Json:
        return await core.administration.all()

    return _run(settings, use, hooks_shown.in_json if in_json else hooks_shown.all_, tells=True)


def show(settings: Settings, name: str, *, in_json: bool) -> int:
    async def use(core: Core) -> Json:
        found = await core.administration.one(as_text(name))
        return {**found, "url": f"{hooks_shown.base(settings)}/hooks/{name}"}

    return _run(settings, use, hooks_shown.in_json if in_json else hooks_shown.one)


def delete(settings: Settings, name: str) -> int:
    async def use(core: Core) -> None:
        await core.administration.remove(as_text(name))

    def told(_: object) -> None:
        note(f"The hook {printable(as_text(name))} is deleted. A running bridge refuses its senders within 2 s.")

    return _run(settings, use, told)


def requests(settings: Settings, name: str, id_: str | None, *, in_json: bool) -> int:
    """Print a hook's last requests, or one of them with its body."""

    async def use(core: Core) -> Json:
        if id_ is None:
            return await core.administration.requests(as_text(name))
        return await core.administration.request(as_text(name), as_text(id_))

    if in_json:
        return _run(settings, use, hooks_shown.in_json)
    return _run(settings, use, hooks_shown.requests if id_ is None else hooks_shown.request)


def preview(
    settings: Settings,
    name: str,
    body: str | None,
    headers: Sequence[str],
    request: str | None,
    template: Path | None,
    *,
    in_json: bool,
) -> int:
    """Print what a request would become. Nothing is sent."""
    if (body is None) == (request is None):
        raise Usage("give the file of a body (- is standard input), or the id of a kept request with --request")
    value: Json = {"request": request} if body is None else {"body": _read(Path(body), "the body")}
    if headers:
        value["headers"] = dict(_header(each) for each in headers)
    if template is not None:
        value["template"] = _template(template)

    async def use(core: Core) -> Json:
        return await core.administration.preview(as_text(name), value)

    return _run(settings, use, hooks_shown.in_json if in_json else hooks_shown.preview)


def test(settings: Settings, name: str) -> int:
    """Send the message of a request as the hook's source sends it, by way of the store, as `send` does."""

    async def send(core: Core, patience: float) -> Told:
        core.registry.open(cipher(settings))  # beside a bridge nobody has
        await core.registry.refresh()
        done = await core.administration.send_sample(as_text(name))
        for warning in done.warnings:
            note(printable(warning))
        if not done.delivery:
            note(f"There was nothing to say: {printable(done.why)}")
            return Told("", "", replayed=False, event_id="")
        return await _settled(core, done.delivery, patience)

    async def use() -> None:
        if found := await through_the_store(bot_core(settings), send):
            print(found)

    return _reported(use())


async def _settled(core: Core, delivery: str, patience: float) -> Told:
    """What became of it, once that is known."""
    ends = core.timing.clock() + patience
    while True:
        row = await core.database.read(partial(delivery_log.get, delivery=delivery))
        state = row["state"] if row is not None else "queued"
        if row is not None and state == "sent":
            return Told(delivery, "", replayed=False, event_id=row["event_id"], history=json.loads(row["history"]))
        if row is not None and state == "dead":
            said = json.loads(row["error"])
            return Told(delivery, "", replayed=False, error=MatrixError(said["error"], errcode=said["errcode"]))
        if core.timing.clock() >= ends:
            return Told(delivery, "", replayed=False, status=state)
        await asyncio.sleep(POLL_SECONDS)


# how they run


def _run(settings: Settings, use: Use, shown: Callable[[Any], None], *, code: int = FAILED, tells: bool = False) -> int:
    async def command() -> None:
        async with _opened(settings, tells=tells) as core:
            found = await use(core)
        shown(found)

    return _reported(command(), code)


@contextlib.asynccontextmanager
async def _opened(settings: Settings, *, tells: bool) -> AsyncIterator[Core]:
    """The core on the store, perhaps beside a running server: nothing is delivered."""
    log.setup(settings.log_format, "error")
    core = Core(settings)
    core.database.open(shared=True)
    if tells or sys.stderr.isatty():
        note(f"The database is {place(core.database.url)}.")
    fernet = cipher(settings)
    core.tokens.unlock(fernet)
    core.requests.open(fernet)
    core.registry.open(fernet)
    core.database.start()
    try:
        core.names.begin()
        await core.registry.refresh()
        yield core
    finally:
        await core.rendering.stop()
        await core.database.stop()
        core.homeserver.close()
        core.relay.close()


def _reported(command: Coroutine[Any, Any, None], code: int = FAILED) -> int:
    """Run it; print why it failed. Returns the exit code: `code` for what the arguments say."""
    try:
        asyncio.run(command)
    except BadContent as error:
        for problem in error.problems:
            say(_in_words(problem))
        return code
    except MatrixError as error:
        say(printable(error.error))
        return FAILED
    return 0


def _in_words(problem: Problem) -> str:
    """By the option that the pointer leads to."""
    pointer = problem.pointer
    option = next((option for at, option in _OPTIONS.items() if pointer == at or pointer.startswith(f"{at}/")), None)
    if option is None:
        option = f"--{pointer.strip('/').split('/')[-1 if pointer.startswith('/verification/') else 0]}"
    where = f" ({pointer})" if pointer.startswith("/template/") else ""
    return f"{option.replace('_', '-') if pointer else 'the arguments'}{where}: {printable(problem.message)}"


# what they read


def _read(path: Path, what: str) -> str:
    """Raises Usage."""
    try:
        if str(path) == STDIN:
            raw = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise Usage(f"{what}: cannot read {printable(as_text(str(path)))}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Usage(f"{what}: {printable(as_text(str(path)))} is not UTF-8") from None
    if len(raw) > MAX_BYTES:
        raise Usage(f"{what}: {printable(as_text(str(path)))} is larger than {MAX_BYTES // 1024**2} MiB")
    return text


def _template(path: Path) -> Any:
    """A template for the member that the file's name says; a .json file holds an object of them."""
    text = _read(path, "--template")
    plain = path.with_suffix("") if path.suffix in _OF_TEMPLATES else path
    if plain.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise Usage(f"--template: {printable(as_text(str(path)))} is not JSON: {error}") from None
    return {_FORMATS.get(plain.suffix.lower(), "markdown"): text.rstrip("\n")}


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise Usage(f"--header: {printable(as_text(text))} is no header: write it like 'X-GitHub-Event: push'")
    return name.strip().lower(), value.strip()
