"""The `flowbridge` command. Each command imports what it needs: `serve` and `--help` must not wait for the others."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flowbridge import __version__
from flowbridge.cli import UNUSABLE, Usage

if TYPE_CHECKING:
    from flowbridge.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Type = Annotated[str, typer.Argument(help="The event type, e.g. m.room.message.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flowbridge {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One HTTP call puts an event into a Matrix room.

    Settings come from the environment or .env: BASE_URL, ACCESS_TOKEN, FLOWBRIDGE_… (the README lists them).
    """


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(envvar="FLOWBRIDGE_HOST", help="The address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="FLOWBRIDGE_PORT", min=0, max=65_535, help="The port to listen on.")
    ] = 8090,
) -> None:
    """Run the bridge. The settings come from the environment or .env: the README lists them."""
    from flowbridge.web import server

    try:
        server.serve(_settings(), host, port)
    except OSError as error:
        _stop(f"cannot listen on {host} port {port}: {error.strerror or error}")
    except KeyboardInterrupt:
        pass  # Ctrl-C is the usual end


@app.command()
def init() -> None:
    """Create the database, for what has to be there before the first `serve`: keys, for instance.

    Only this, `serve` and `demo` create one. Where it exists already, it stays as it is.
    """
    from flowbridge.cli import store

    store.create(_settings())


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Stop after the table.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The bridge's port.")] = 8090,
) -> None:
    """Start a real homeserver on this machine, send every event of the seed documents, and read each back."""
    from flowbridge.cli.demo.command import demo as run

    raise typer.Exit(run(once=once, port=port))


MESSAGE = "A message"  # the options' heading in the help
Target = "an event id ($…), a delivery's id, or key:NAME"


@app.command()
def send(
    room: Annotated[
        str, typer.Argument(help="A room id (!…), an alias (#name:server) or, for a message, a user (@name:server).")
    ],
    event_type: Annotated[
        str | None,
        typer.Argument(metavar="[TYPE|-]", help="The type of a whole event, e.g. m.room.topic; - or none: a message."),
    ] = None,
    body: Annotated[str, typer.Argument(metavar="[JSON|-]", help="The event's payload; - reads standard input.")] = "-",
    text: Annotated[
        str | None, typer.Option(rich_help_panel=MESSAGE, help="What to say, as it is; - reads standard input.")
    ] = None,
    markdown: Annotated[str | None, typer.Option(rich_help_panel=MESSAGE, help="The same, in Markdown.")] = None,
    html: Annotated[str | None, typer.Option(rich_help_panel=MESSAGE, help="The same, in HTML.")] = None,
    title: Annotated[str | None, typer.Option(rich_help_panel=MESSAGE, help="A first line, in bold.")] = None,
    msgtype: Annotated[
        str | None, typer.Option(rich_help_panel=MESSAGE, help="m.text (default), m.notice or m.emote.")
    ] = None,
    notice: Annotated[
        bool, typer.Option("--notice", rich_help_panel=MESSAGE, help="Short for --msgtype m.notice.")
    ] = False,
    mention: Annotated[
        list[str] | None,
        typer.Option(metavar="@USER:SERVER", rich_help_panel=MESSAGE, help="Whom to ping, or @room; may be repeated."),
    ] = None,
    reply_to: Annotated[
        str | None, typer.Option(metavar="TARGET", rich_help_panel=MESSAGE, help=f"What to answer: {Target}.")
    ] = None,
    thread: Annotated[
        str | None, typer.Option(metavar="TARGET", rich_help_panel=MESSAGE, help="The thread to say it in.")
    ] = None,
    edit: Annotated[
        str | None, typer.Option(metavar="TARGET", rich_help_panel=MESSAGE, help="What to replace with it.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=MESSAGE, help="What it is about: the next message with it edits this one."
        ),
    ] = None,
    on_update: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MESSAGE,
            help="What it is to the first one with its --key: edit (default), thread, reply or new.",
        ),
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option(rich_help_panel=MESSAGE, help="A file to attach; may be repeated.")
    ] = None,
    caption: Annotated[
        list[str] | None, typer.Option(rich_help_panel=MESSAGE, help="The first is the first file's, and so on.")
    ] = None,
    overflow: Annotated[
        str | None,
        typer.Option(rich_help_panel=MESSAGE, help="file: a text that is too long is cut, and attached as a whole."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="A repeat with the same text sends nothing more: for jobs that are retried."),
    ] = None,
) -> None:
    """Send a message, or one event of any type, as the bot account. Prints the event id of each event.

    Without an option that says what to say, standard input is the text: backup | flowbridge send '#ops:example.org'

    What cannot be sent now is queued: the exit code is 0, and a flowbridge that runs on the same store sends it.
    """
    from flowbridge.cli import files, say
    from flowbridge.cli import send as events

    if notice and msgtype not in (None, "m.notice"):
        raise Usage(f"--notice is short for --msgtype m.notice, and --msgtype says {msgtype}")
    given = {
        "text": text,
        "markdown": markdown,
        "html": html,
        "title": title,
        "msgtype": "m.notice" if notice else msgtype,
        "mentions": mention,
        "reply_to": reply_to,
        "thread": thread,
        "edit": edit,
        "key": key,
        "on_update": on_update,
        "overflow": overflow,
    }
    attached = files.named(file or [], caption or [])
    reads = event_type == say.STDIN and body == say.STDIN
    if event_type is None or reads:
        settings = _settings()
        value = say.said(given, files=bool(attached), reads=reads)
        raise typer.Exit(say.run(settings, room, value, attached, idempotency_key))
    if attached or any(item is not None for item in given.values()):
        raise Usage(f"{event_type} is the type of a whole event, and the options make a message: give one or the other")
    if body == say.STDIN and sys.stdin.isatty():  # a text, perhaps, and its sender would wait for ever
        print(f"Type the payload of {event_type}, then Ctrl-D. To say a text: --text '…'", file=sys.stderr)
    raise typer.Exit(events.send(_settings(), room, event_type, _input(body), idempotency_key))


@app.command()
def validate(
    event_type: Type,
    file: Annotated[Path, typer.Argument(metavar="[FILE|-]", help="The payload; - reads standard input.")] = Path("-"),
) -> None:
    """Check a payload against its schema, as a send would."""
    from flowbridge.cli import send as events

    raise typer.Exit(events.validate(_settings(), event_type, _read(file)))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the settings against the real homeserver: exit code 1 when something is wrong."""
    from flowbridge.cli import doctor as examination

    raise typer.Exit(examination.run(_settings(), in_json=as_json))


@app.command()
def backup(
    path: Annotated[Path, typer.Argument(help="A new file, or a folder: then the time is the file's name.")],
) -> None:
    """Copy the SQLite database and its key file, whether the bridge runs or not."""
    from flowbridge.cli import backup as copying

    raise typer.Exit(copying.run(_settings(), path))


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    import json

    from flowbridge.settings import Settings
    from flowbridge.web.app import create_app

    document = create_app(Settings.model_construct()).app.openapi()
    print(json.dumps(document, indent=2, ensure_ascii=False))


delivery_log = typer.Typer(
    no_args_is_help=True, help="The delivery log: what became of events, and sending them again."
)
app.add_typer(delivery_log, name="deliveries")

InRoom = Annotated[str, typer.Option("--room", metavar="ROOM", help="Only of this room: its id, or an alias.")]
OfType = Annotated[str, typer.Option("--type", metavar="TYPE", help="Only of this event type.")]
Since = Annotated[str, typer.Option(metavar="TIME", help="Accepted since: 2026-11-22T10:00:00Z (UTC), or 2h, 7d ago.")]


@delivery_log.command("list")
def list_deliveries(
    state: Annotated[list[str] | None, typer.Option(help="sent, queued, dead or refused; may be repeated.")] = None,
    room: InRoom = "",
    event_type: OfType = "",
    key: Annotated[
        str, typer.Option(metavar="KEY", help="Only what was sent under this Idempotency-Key or txnId.")
    ] = "",
    hook: Annotated[str, typer.Option(metavar="NAME", help="Only what came by this hook.")] = "",
    since: Since = "",
    q: Annotated[str, typer.Option("--q", metavar="TEXT", help="Only with this text in its content.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many at most.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, the newest first."""
    from flowbridge.cli import deliveries, selection

    selected = selection.select(
        state=state or [], room=room, event_type=event_type, key=key, hook=hook, since=since, text=q
    )
    raise typer.Exit(deliveries.show_all(_settings(), selected, limit, in_json=as_json))


@delivery_log.command("show")
def show_delivery(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `deliveries list` shows it.")], as_json: AsJson = False
) -> None:
    """Show a delivery: its request as it came, the event, and every attempt."""
    from flowbridge.cli import deliveries

    raise typer.Exit(deliveries.show(_settings(), id_, in_json=as_json))


@delivery_log.command("replay")
def replay_deliveries(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Sent or dead deliveries.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All dead letters, the oldest first.")] = False,
    room: InRoom = "",
    event_type: OfType = "",
    since: Since = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also state events whose room state has been set since.")
    ] = False,
) -> None:
    """Send events again. A running bridge finds them within 10 seconds."""
    from flowbridge.cli import replay, selection

    if bool(ids) == dead or ((room or event_type or since) and not dead):
        raise Usage("name the deliveries, or say --dead (and only then --room, --type, --since)")
    if ids:
        raise typer.Exit(replay.replay(_settings(), ids, overwrite=overwrite))
    selected = selection.select(state=["dead"], room=room, event_type=event_type, since=since)
    raise typer.Exit(replay.replay_dead(_settings(), selected, overwrite=overwrite))


@delivery_log.command("purge")
def purge_deliveries(
    state: Annotated[list[str] | None, typer.Option(help="sent, dead or refused; all by default.")] = None,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Settled longer ago than 90m, 12h, 7d.")] = "",
    queued: Annotated[bool, typer.Option("--queued", help="Queued events instead: they will not be sent.")] = False,
    user: Annotated[str, typer.Option(metavar="@USER:SERVER", help="Only events queued by this user.")] = "",
    room: Annotated[str, typer.Option(metavar="ROOM", help="Only events queued for this room (id or alias).")] = "",
    key: Annotated[str, typer.Option(metavar="ID", help="Only events queued by this API key.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="All queued events.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete settled events, or (--queued) events to be sent. An Idempotency-Key used for one then counts as new."""
    from flowbridge.cli import purge

    if queued:
        if state or older_than:
            raise Usage("--queued goes with --user, --room, --key and --all only")
        raise typer.Exit(purge.purge_queued(_settings(), user=user, room=room, key=key, everything=everything, yes=yes))
    if user or room or key or everything:
        raise Usage("--user, --room, --key and --all go with --queued only")
    raise typer.Exit(purge.purge(_settings(), state or [], older_than, yes=yes))


api_keys = typer.Typer(no_args_is_help=True, help="API keys, which let callers act as the bot account.")
app.add_typer(api_keys, name="keys")


@api_keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="A name to list it by.")] = "",
    room: Annotated[list[str] | None, typer.Option(help="Only for this room (id or alias); may be repeated.")] = None,
    event_type: Annotated[
        list[str] | None, typer.Option(help="Only for this event type, or m.room.* for many; may be repeated.")
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID", help="May see and replay what this Matrix user sent with its own token; may be repeated."
        ),
    ] = None,
    admin: Annotated[
        bool,
        typer.Option(
            "--admin",
            help="May see all callers' deliveries in its rooms and of its event types; without such limits, may also "
            "use the whole Matrix API.",
        ),
    ] = False,
) -> None:
    """Create a key. It is printed once, alone on standard output."""
    from flowbridge.cli import keys

    raise typer.Exit(keys.create(_settings(), name, room or [], event_type or [], user or [], admin=admin))


@api_keys.command("list")
def list_keys() -> None:
    """List all keys with what they may do, never the keys themselves."""
    from flowbridge.cli import keys

    raise typer.Exit(keys.show(_settings()))


@api_keys.command("revoke")
def revoke_key(id_: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]) -> None:
    """Revoke a key: a running bridge refuses it within 2 s."""
    from flowbridge.cli import keys

    raise typer.Exit(keys.revoke(_settings(), id_))


webhooks = typer.Typer(no_args_is_help=True, help="Hooks: URLs that other tools report to by a webhook.")
app.add_typer(webhooks, name="hooks")

HookName = Annotated[str, typer.Argument(metavar="NAME", help="As `hooks list` shows it.")]
Template = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A template in Markdown; .html and .txt say another format, .json holds one for each member.",
    ),
]
SecretFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Holds the secret, of 16 characters at least; - is standard input.")
]


@webhooks.command("create")
def create_hook(
    name: Annotated[str, typer.Argument(help="A name of a-z, 0-9, '.', '_' and '-': it stands in the URL.")],
    room: Annotated[str, typer.Option(help="Where its messages go: a room id, an alias, or @user:server.")],
    source: Annotated[str, typer.Option(help="Which tool it listens to; auto tells it by the request.")] = "auto",
    scheme: Annotated[str, typer.Option(help="How its sender proves who it is: token, github, hmac …")] = "token",
    secret_file: SecretFile = None,
    header: Annotated[str, typer.Option(help="The header with the signature, for hmac.")] = "",
    prefix: Annotated[str, typer.Option(help="What stands before the signature, for hmac: sha256=")] = "",
    encoding: Annotated[str, typer.Option(help="Of the signature, for hmac: hex (default) or base64.")] = "",
    timestamp_header: Annotated[
        str, typer.Option(help="The header with the time that is signed, too, for hmac and grafana.")
    ] = "",
    template: Template = None,
    per: Annotated[str, typer.Option(help="One message for each: notification (default) or alerts.")] = "",
    on_update: Annotated[
        str, typer.Option(help="What news is to the first message: edit (default), thread, reply or new.")
    ] = "",
    mention: Annotated[
        list[str] | None,
        typer.Option(metavar="@USER:SERVER", help="Whom to ping when something fires, or @room; may be repeated."),
    ] = None,
    mentions: Annotated[str, typer.Option(help="Who may be pinged at all: never, firing (default) or template.")] = "",
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="EVENT", help="An event that is not shown: push; +EVENT shows one. May be repeated."),
    ] = None,
    keep_requests: Annotated[int | None, typer.Option(help="How many past requests are kept, 0 to 20.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Change the hook of this name instead; it keeps its secrets.")
    ] = False,
) -> None:
    """Make a hook. Prints its URL on a line of its own, then a line to try it."""
    from flowbridge.cli import hooks

    given = {
        "name": name,
        "room": room,
        "source": source,
        "verification": {
            "scheme": scheme,
            "header": header,
            "prefix": prefix,
            "encoding": encoding,
            "timestamp_header": timestamp_header,
        },
        "per": per,
        "on_update": on_update,
        "mention": mention,
        "mentions": mentions,
        "ignore": ignore,
        "keep_requests": keep_requests,
    }
    raise typer.Exit(hooks.create(_settings(), given, template, secret_file, replace=replace))


@webhooks.command("list")
def list_hooks(as_json: AsJson = False) -> None:
    """List all hooks, never their secrets."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.show_all(_settings(), in_json=as_json))


@webhooks.command("show")
def show_hook(name: HookName, as_json: AsJson = False) -> None:
    """Show a hook, but not its secrets: how old they are, and how its template failed."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.show(_settings(), name, in_json=as_json))


@webhooks.command("rotate")
def rotate_hook(
    name: HookName,
    secret_file: SecretFile = None,
    now: Annotated[bool, typer.Option("--now", help="The old secrets end at once, not after 7 days.")] = False,
) -> None:
    """Give a hook a new secret. The previous one stays valid for 7 days."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.rotate(_settings(), name, secret_file, now=now))


@webhooks.command("delete")
def delete_hook(name: HookName) -> None:
    """Delete a hook, with its secrets and its kept requests."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.delete(_settings(), name))


@webhooks.command("test")
def test_hook(name: HookName) -> None:
    """Send the message of a typical request of its source. Prints the event id."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.test(_settings(), name))


@webhooks.command("requests")
def hook_requests(
    name: HookName,
    id_: Annotated[str | None, typer.Argument(metavar="[ID]", help="One of them, with its body.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the last requests of a hook, and what was done with them."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.requests(_settings(), name, id_, in_json=as_json))


@webhooks.command("preview")
def preview_hook(
    name: HookName,
    body: Annotated[str | None, typer.Argument(metavar="[FILE|-]", help="A request's body.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="'NAME: VALUE'", help="A header of the request; may be repeated.")
    ] = None,
    request: Annotated[str | None, typer.Option(metavar="ID", help="A kept request, instead of a body.")] = None,
    template: Template = None,
    as_json: AsJson = False,
) -> None:
    """Print what a request would become. Nothing is sent. --template tries another template."""
    from flowbridge.cli import hooks

    raise typer.Exit(hooks.preview(_settings(), name, body, header or [], request, template, in_json=as_json))


devices = typer.Typer(no_args_is_help=True, help="The bot's device, which encrypts and decrypts.")
app.add_typer(devices, name="device")


@devices.command("setup")
def set_up_device(
    reset: Annotated[
        bool,
        typer.Option(
            "--reset",
            help="Replace the account's cross-signing keys: whoever has verified it is warned, and its other devices "
            "are unsigned.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Make the device, and make it the account's own. The recovery key is printed once, alone on standard output."""
    from flowbridge.cli import device

    raise typer.Exit(device.set_up(_settings(), reset=reset, yes=yes))


@devices.command("status")
def show_device(as_json: AsJson = False) -> None:
    """Say how the device stands: whether others may rely on it, and who has it. The exit code is 1 unless they may."""
    from flowbridge.cli import device

    raise typer.Exit(device.status(_settings(), in_json=as_json))


@devices.command("recover")
def recover_device() -> None:
    """Sign the device by the account's recovery key or passphrase, which is asked for, or read on standard input."""
    from flowbridge.cli import device

    raise typer.Exit(device.recover(_settings()))


@devices.command("verify")
def verify_device(
    user: Annotated[str, typer.Argument(metavar="USER", help="Whose client asks, for example @alice:example.org.")],
) -> None:
    """Verify the device with a client of a user, who starts it there: compare seven emoji. Waits for ten minutes."""
    from flowbridge.cli import device_verify

    raise typer.Exit(device_verify.verify(_settings(), user))


def main() -> None:
    """Run a command; a setting or an argument that cannot be used is one line and exit code 2."""
    try:
        app()
    except Usage as error:
        _stop(str(error))
    except Exception as error:
        if line := _line(error):
            _stop(line)
        raise


def _line(error: Exception) -> str:
    """What an operator reads of it; empty for a mistake of ours."""
    # With these comes the store: 0.3 s of processor time, which `--help` need not wait for.
    from flowbridge.events.schema_lint import SchemaError
    from flowbridge.homeserver.base_url import AddressError
    from flowbridge.settings import SettingsError
    from flowbridge.store.errors import StoreError

    match error:
        case SettingsError():
            return str(error)
        case AddressError():
            return f"BASE_URL: {error}"
        case SchemaError():
            return f"FLOWBRIDGE_SCHEMAS_DIR: {error}"
        case StoreError():
            return f"FLOWBRIDGE_DATABASE_URL: {error}"
    return ""


def _settings() -> "Settings":
    from flowbridge.settings import Settings

    return Settings.load()


def _stop(line: str) -> NoReturn:
    print(f"flowbridge: {line}", file=sys.stderr)
    sys.exit(UNUSABLE)


def _input(text: str) -> bytes:
    return sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")


def _read(file: Path) -> bytes:
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        _stop(f"cannot read {file}: {error.strerror}")


KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="In the format of clients' key exports.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Holds the passphrase, which is asked for otherwise, or read on standard input."),
]


@devices.command("export-keys")
def export_room_keys(file: KeyFile, passphrase_file: PassphraseFile = None) -> None:
    """Write the keys of all rooms to a new file (0600), for another client: with them it reads what the bridge can."""
    from flowbridge.cli import device_keys

    raise typer.Exit(device_keys.export_keys(_settings(), file, passphrase_file))


@devices.command("import-keys")
def import_room_keys(file: KeyFile, passphrase_file: PassphraseFile = None) -> None:
    """Read room keys that a client has exported. What is read with them is not `verified`: a file proves no sender."""
    from flowbridge.cli import device_keys

    raise typer.Exit(device_keys.import_keys(_settings(), file, passphrase_file))
