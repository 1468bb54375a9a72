"""The statements that each event takes, run by the driver itself.

SQLAlchemy's execution of a statement costs 50 to 600 µs, as much as the events in it; that of the driver 5 to 20. So a
statement's text is compiled once, from the tables, and the rest is left to sqlite3 or psycopg. Errors are SQLAlchemy's.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Column,
    Connection,
    Integer,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    column,
    func,
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ClauseElement, ColumnElement

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

Insert: TypeAlias = "postgresql.Insert | sqlite.Insert"
Values = Mapping[str, Any]


class Statement:
    """A statement of SQLAlchemy's. `make`: gives it for a dialect, by its name. Its values are named."""

    def __init__(self, make: Callable[[str], ClauseElement]) -> None:
        self._make = make
        self._compiled: dict[str, tuple[str, Values]] = {}

    def rows(self, connection: Connection, values: Values) -> list[tuple[Any, ...]]:
        """What a query finds, or what RETURNING returns."""
        found: list[tuple[Any, ...]] = self.run(connection, values).fetchall()
        return found

    def run(self, connection: Connection, values: Values) -> Any:
        """Returns the driver's cursor."""
        text, constants = self._text(connection)
        return execute(connection, text, {**constants, **values} if constants else values)

    def run_all(self, connection: Connection, rows: Sequence[Values]) -> Any:
        """For all of these rows: a statement whose values come from `given`. Returns the driver's cursor."""
        text, _ = self._text(connection)
        if connection.dialect.name == "postgresql":
            return execute(connection, text, {"rows": to_json(rows)})
        return _call(connection, "executemany", text, rows)

    def _text(self, connection: Connection) -> tuple[str, Values]:
        """The text for this engine, and the values that it has from the beginning."""
        dialect = connection.dialect
        found = self._compiled.get(dialect.name)
        if found is None:
            named = sqlite.dialect(paramstyle="named") if dialect.name == "sqlite" else dialect
            compiled = self._make(dialect.name).compile(dialect=named)
            constants = {name: value for name, value in compiled.params.items() if value is not None}
            found = self._compiled[dialect.name] = str(compiled), constants
        return found


def execute(connection: Connection, text: str, values: Values | Sequence[Any] = ()) -> Any:
    """Run some text; returns the driver's cursor."""
    return _call(connection, "execute", text, values)


def of(connection: Connection) -> Any:
    """The driver's own connection."""
    return connection.connection.driver_connection


def _call(connection: Connection, name: str, text: str, values: Any) -> Any:
    raw = of(connection)
    try:
        return getattr(raw.cursor(), name)(text, values)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _told(connection, raw, text, error) from error


def _told(connection: Connection, raw: Any, text: str, error: Any) -> BaseException:
    """The error as SQLAlchemy raises it, and its connection thrown away where it is lost."""
    dialect = connection.dialect
    is_lost = dialect.is_disconnect(error, raw, None)
    if is_lost:
        connection.invalidate(error)
    told: BaseException = DBAPIError.instance(
        text, None, error, dialect.loaded_dbapi.Error, connection_invalidated=is_lost, dialect=dialect
    )
    return told


# several values, or rows, in one statement


def is_one_of(dialect: str, found: ColumnElement[str], name: str) -> ColumnElement[bool]:
    """Whether a column is one of several texts, which are given as `texts` makes them."""
    if dialect == "postgresql":
        return found == any_(bindparam(name, type_=ARRAY(Text)))
    return found.in_(select(func.json_each(bindparam(name)).table_valued("value").c.value))


def texts(connection: Connection, given: Iterable[str]) -> Any:
    return list(given) if connection.dialect.name == "postgresql" else to_json(list(given))


Given = Callable[[str], ColumnElement[Any]]


def given(dialect: str, columns: Mapping[str, Column[Any]]) -> Given:
    """The values, by name, of each of the rows of `run_all`, which have the types of these columns.

    PostgreSQL gets all rows as one text: psycopg would send each row by itself (40 instead of 10 µs each of ours), and
    making an array for each column takes it as long.
    """
    if dialect == "sqlite":
        return bindparam
    shape = [column(name, BigInteger if isinstance(of.type, Integer) else Text) for name, of in columns.items()]
    rows = func.json_to_recordset(cast(bindparam("rows", type_=Text), JSON))
    return rows.table_valued(*shape).render_derived(name="given", with_types=True).c.__getitem__


def insert(dialect: str, table: Table) -> "Insert":
    """An INSERT that can say what happens to a row that exists already."""
    if dialect == "sqlite":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # 2 MB, which a bridge on SQLite never needs

    return postgresql.insert(table)


def insertion(dialect: str, table: Table, names: Sequence[str]) -> "Insert":
    """An INSERT of all rows of `run_all`, in their order."""
    value = given(dialect, {name: table.c[name] for name in names})
    made = insert(dialect, table)
    if dialect == "sqlite":
        return made.values({name: value(name) for name in names})
    return made.from_select(names, select(*map(value, names)))


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
