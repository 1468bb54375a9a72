"""What databases are asked, by SQLAlchemy or by their driver itself, and what they refuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from flowbridge.store import driver


@dataclass(frozen=True)
class Heard:
    """`asked`: texts with their values; `refused`: errors."""

    asked: list[tuple[str, Any]] = field(default_factory=list)
    refused: list[BaseException] = field(default_factory=list)


@contextmanager
def heard(*engines: Engine) -> Iterator[Heard]:
    found, call = Heard(), driver._call

    def note(_: Any, __: Any, text: str, values: Any, *___: Any) -> None:
        found.asked.append((text, values))

    def refuse(failure: ExceptionContext) -> None:
        found.refused.append(failure.original_exception)

    def noted(connection: Connection, name: str, text: str, values: Any) -> Any:
        if connection.engine in engines:
            found.asked.append((text, values))
        try:
            return call(connection, name, text, values)
        except Exception as error:
            if connection.engine in engines:
                found.refused.append(error)
            raise

    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
        event.listen(engine, "handle_error", refuse)
    driver._call = noted
    try:
        yield found
    finally:
        driver._call = call
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
            event.remove(engine, "handle_error", refuse)
