"""What commands print: text that cannot control the terminal, JSON, questions, and progress."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress

from flowbridge.cli import Usage


def note(line: str) -> None:
    """Print beside the output: on standard error."""
    print(line, file=sys.stderr)


def say(line: str) -> None:
    """Print what went wrong, or has to be known, after the program's name."""
    note(f"flowbridge: {line}")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def printable(text: str) -> str:
    """Control characters as JSON escapes them; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1] for character in text
    )


def as_text(argument: str) -> str:
    """An argument as text that can be encoded: it may not have been UTF-8."""
    return argument.encode("utf-8", "replace").decode()


def confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise Usage("nothing can be asked here: --yes deletes without asking")
    return typer.confirm(question, err=True)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; yields a function that advances it."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.advance(task, number)
