"""The `flowbridge` command. Each command imports what it needs: `serve` and `--help` must not wait for the others."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One HTTP call puts an event into a Matrix room.",
)

Room = Annotated[str, typer.Argument(help="A room id (!…) or an alias (#name:server).")]
Type = Annotated[str, typer.Argument(help="The event type, e.g. m.room.message.")]

USAGE = 2  # the exit code for settings or arguments that cannot be used


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port to listen on.")] = 8090,
) -> None:
    """Run the bridge."""
    from flowbridge.settings import Settings
    from flowbridge.web import server

    try:
        server.serve(Settings.load(), host, port)
    except OSError as error:
        _stop(f"cannot listen on {host} port {port}: {error.strerror or error}")
    except KeyboardInterrupt:
        pass  # Ctrl-C is how it is meant to end


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Stop after the table.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The bridge's port.")] = 8090,
) -> None:
    """Start a real homeserver on this machine, send every event of the seed documents, read each back."""
    from flowbridge.cli.demo.command import demo as run

    raise typer.Exit(run(once=once, port=port))


@app.command()
def send(
    room: Room,
    event_type: Type,
    body: Annotated[str, typer.Argument(metavar="[JSON|-]", help="The payload; - reads standard input.")] = "-",
) -> None:
    """Send one event as the bot account. Prints the event id.

    What cannot be sent now is queued: the exit code is 0, and a flowbridge that runs on the same store sends it.
    """
    from flowbridge.cli import send as events
    from flowbridge.settings import Settings

    raise typer.Exit(events.send(Settings.load(), room, event_type, _input(body)))


@app.command()
def validate(
    event_type: Type,
    file: Annotated[Path, typer.Argument(metavar="[FILE|-]", help="The payload; - reads standard input.")] = Path("-"),
) -> None:
    """Check a payload against its schema, as a send would."""
    from flowbridge.cli import send as events
    from flowbridge.settings import Settings

    raise typer.Exit(events.validate(Settings.load(), event_type, _read(file)))


@app.command()
def doctor() -> None:
    """Check the settings against the real homeserver."""
    from flowbridge.cli import doctor as examination
    from flowbridge.settings import Settings

    raise typer.Exit(examination.run(Settings.load()))


@app.command()
def backup(
    path: Annotated[Path, typer.Argument(help="A file that is not there yet, or a folder: then the time is its name.")],
) -> None:
    """Copy the SQLite database, beside a running bridge or without, and its key file."""
    from flowbridge.cli import backup as copying
    from flowbridge.settings import Settings

    raise typer.Exit(copying.run(Settings.load(), path))


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

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
InRoom = Annotated[str, typer.Option("--room", metavar="ID", help="Only of this room; no alias.")]
OfType = Annotated[str, typer.Option("--type", metavar="TYPE", help="Only of this event type.")]
Since = Annotated[str, typer.Option(metavar="TIME", help="Accepted since: 2026-11-22T10:00:00Z (UTC), or 2h, 7d ago.")]


@delivery_log.command("list")
def list_deliveries(
    state: Annotated[list[str] | None, typer.Option(help="sent, queued or dead; may be repeated.")] = None,
    room: InRoom = "",
    event_type: OfType = "",
    since: Since = "",
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many at most.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, the newest first."""
    from flowbridge.cli import deliveries
    from flowbridge.settings import Settings

    with _usage():
        selection = deliveries.choose(state=state or [], room=room, event_type=event_type, since=since)
        raise typer.Exit(deliveries.show_all(Settings.load(), selection, limit, as_json=as_json))


@delivery_log.command("show")
def show_delivery(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `deliveries list` shows it.")], as_json: AsJson = False
) -> None:
    """Show a delivery: its request as it came, the event, and every attempt."""
    from flowbridge.cli import deliveries
    from flowbridge.settings import Settings

    raise typer.Exit(deliveries.show(Settings.load(), id_, as_json=as_json))


@delivery_log.command("replay")
def replay_deliveries(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="What is sent or dead.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All dead letters, the oldest first.")] = False,
    room: InRoom = "",
    event_type: OfType = "",
    since: Since = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="State events, too, whose room state has been set since.")
    ] = False,
) -> None:
    """Send events again. A running bridge finds them by itself, within 10 seconds."""
    from flowbridge.cli import deliveries
    from flowbridge.settings import Settings

    with _usage():
        if bool(ids) == dead or ((room or event_type or since) and not dead):
            raise deliveries.Usage("name the deliveries, or say --dead (and only then --room, --type, --since)")
        if ids:
            raise typer.Exit(deliveries.replay(Settings.load(), ids, overwrite=overwrite))
        selection = deliveries.choose(state=["dead"], room=room, event_type=event_type, since=since)
        raise typer.Exit(deliveries.replay_dead(Settings.load(), selection, overwrite=overwrite))


@delivery_log.command("purge")
def purge_deliveries(
    state: Annotated[list[str] | None, typer.Option(help="sent or dead; both when it is not given.")] = None,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Settled longer ago than 90m, 12h, 7d.")] = "",
    queued: Annotated[bool, typer.Option("--queued", help="What is queued instead: it will not be sent.")] = False,
    user: Annotated[str, typer.Option(metavar="@USER:SERVER", help="Only what is queued of this user.")] = "",
    room: Annotated[str, typer.Option(metavar="!ROOM", help="Only what is queued for this room.")] = "",
    key: Annotated[str, typer.Option(metavar="ID", help="Only what this API key has queued.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="All that is queued.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete what is settled, or (--queued) what is to be sent. An Idempotency-Key used for it then counts as new."""
    from flowbridge.cli import deliveries
    from flowbridge.settings import Settings

    with _usage():
        if queued:
            if state or older_than:
                raise deliveries.Usage("--queued goes with --user, --room, --key and --all only")
            chosen = {"user": user, "room": room, "key": key}
            raise typer.Exit(deliveries.purge_queued(Settings.load(), **chosen, everything=everything, yes=yes))
        if user or room or key or everything:
            raise deliveries.Usage("--user, --room, --key and --all go with --queued only")
        raise typer.Exit(deliveries.purge(Settings.load(), state or [], older_than, yes=yes))


api_keys = typer.Typer(no_args_is_help=True, help="API keys, which let callers act as the bot account.")
app.add_typer(api_keys, name="keys")


@api_keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What to list it as.")] = "",
    room: Annotated[list[str] | None, typer.Option(help="Only for this room (id or alias); may be repeated.")] = None,
    event_type: Annotated[
        list[str] | None, typer.Option(help="Only for this event type, or m.room.* for many; may be repeated.")
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID", help="May see, and send again, what this Matrix user sent by itself; may be repeated."
        ),
    ] = None,
    admin: Annotated[
        bool,
        typer.Option(
            "--admin",
            help="May see everybody's deliveries, in its rooms and of its event types; without limits also use the "
            "whole Matrix API.",
        ),
    ] = False,
) -> None:
    """Make a key. It is printed once, alone on standard output."""
    from flowbridge.cli import keys
    from flowbridge.settings import Settings

    raise typer.Exit(keys.create(Settings.load(), name, room or [], event_type or [], user or [], admin=admin))


@api_keys.command("list")
def list_keys() -> None:
    """List all keys with what they may do, never the keys themselves."""
    from flowbridge.cli import keys
    from flowbridge.settings import Settings

    raise typer.Exit(keys.show(Settings.load()))


@api_keys.command("revoke")
def revoke_key(id_: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]) -> None:
    """Revoke a key: a running bridge refuses it within 2 s."""
    from flowbridge.cli import keys
    from flowbridge.settings import Settings

    raise typer.Exit(keys.revoke(Settings.load(), id_))


def main() -> None:
    """Run a command; what is wrong with a setting is one line and exit code 2."""
    from flowbridge.events.schema_lint import SchemaError
    from flowbridge.homeserver.address import AddressError
    from flowbridge.settings import SettingsError
    from flowbridge.store.errors import StoreError

    try:
        app()
    except SettingsError as error:
        _stop(str(error))
    except AddressError as error:
        _stop(f"BASE_URL: {error}")
    except SchemaError as error:
        _stop(f"FLOWBRIDGE_SCHEMAS_DIR: {error}")
    except StoreError as error:
        _stop(f"FLOWBRIDGE_DATABASE_URL: {error}")


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    from flowbridge.cli.deliveries import Usage

    try:
        yield
    except Usage as error:
        _stop(str(error))


def _stop(line: str) -> NoReturn:
    print(f"flowbridge: {line}", file=sys.stderr)
    sys.exit(USAGE)


def _input(text: str) -> bytes:
    return sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")


def _read(file: Path) -> bytes:
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        _stop(f"cannot read {file}: {error.strerror}")
