"""The `flowbridge` command. Each command imports what it needs: `serve` and `--help` must not wait for the others."""

import sys
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
    from flowbridge import serve as server
    from flowbridge.settings import Settings

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
    from flowbridge.demo.command import demo as run

    raise typer.Exit(run(once=once, port=port))


@app.command()
def send(
    room: Room,
    event_type: Type,
    body: Annotated[str, typer.Argument(metavar="[JSON|-]", help="The payload; - reads standard input.")] = "-",
) -> None:
    """Send one event as the bot account. Prints the event id."""
    from flowbridge import commands
    from flowbridge.settings import Settings

    raise typer.Exit(commands.send(Settings.load(), room, event_type, _input(body)))


@app.command()
def validate(
    event_type: Type,
    file: Annotated[Path, typer.Argument(metavar="[FILE|-]", help="The payload; - reads standard input.")] = Path("-"),
) -> None:
    """Check a payload against its schema, as a send would."""
    from flowbridge import commands
    from flowbridge.settings import Settings

    raise typer.Exit(commands.validate(Settings.load(), event_type, _read(file)))


@app.command()
def doctor() -> None:
    """Check the settings against the real homeserver."""
    from flowbridge import doctor as examination
    from flowbridge.settings import Settings

    raise typer.Exit(examination.run(Settings.load()))


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    import json

    from flowbridge.app import create_app
    from flowbridge.settings import Settings

    document = create_app(Settings.model_construct()).app.openapi()
    print(json.dumps(document, indent=2, ensure_ascii=False))


def main() -> None:
    """Run a command; what is wrong with a setting is one line and exit code 2."""
    from flowbridge.catalogue.lint import SchemaError
    from flowbridge.homeserver.address import AddressError
    from flowbridge.settings import SettingsError

    try:
        app()
    except SettingsError as error:
        _stop(str(error))
    except AddressError as error:
        _stop(f"BASE_URL: {error}")
    except SchemaError as error:
        _stop(f"FLOWBRIDGE_SCHEMAS_DIR: {error}")


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
