"""Statements that the driver runs: their values, and their errors, which are SQLAlchemy's."""

from typing import Any

import pytest
from sqlalchemy import Engine, bindparam, select, update
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError

from flowbridge.store import driver
from flowbridge.store.driver import Statement
from flowbridge.store.jobs import is_transient
from flowbridge.store.tables import resolved
from tests.integration.store.events import only_postgresql

NAMES = ("name", "value", "seen_at")
INSERT = Statement(lambda dialect: driver.insertion(dialect, resolved, NAMES))
FIND = Statement(
    lambda dialect: (
        select(resolved.c.name, resolved.c.value, resolved.c.seen_at)
        .where(driver.is_one_of(dialect, resolved.c.name, "names"))
        .order_by(resolved.c.name)
        .limit(2)
    )
)


def _set(dialect: str) -> Any:
    value = driver.given(dialect, {name: resolved.c[name] for name in NAMES})
    return update(resolved).where(resolved.c.name == value("name")).values(seen_at=value("seen_at"))


SET = Statement(_set)


def row(name: str, value: str | None = "v", seen_at: int = 2**40) -> dict[str, Any]:
    return {"name": name, "value": value, "seen_at": seen_at}


def test_rows_come_back_as_they_were_given(engine: Engine) -> None:
    given = [row("a", "\u2713 '\"\\ \\u0000"), row("b", ""), row("c")]
    with engine.begin() as connection:
        INSERT.run_all(connection, given)
        found = FIND.rows(connection, {"names": driver.texts(connection, ["a", "b", "x"])})
    assert [dict(zip(NAMES, each, strict=True)) for each in found] == given[:2]


def test_constants_of_a_statement_are_among_its_values(engine: Engine) -> None:
    with engine.begin() as connection:
        INSERT.run_all(connection, [row("a"), row("b"), row("c")])
        assert len(FIND.rows(connection, {"names": driver.texts(connection, ["a", "b", "c"])})) == 2


def test_each_row_is_changed_by_its_own_values(engine: Engine) -> None:
    with engine.begin() as connection:
        INSERT.run_all(connection, [row("a"), row("b")])
        SET.run_all(connection, [row("b", seen_at=2), row("a", seen_at=1), row("x")])
        found = FIND.rows(connection, {"names": driver.texts(connection, ["a", "b"])})
    assert [(name, seen_at) for name, _, seen_at in found] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("poison", [row("a"), row("b", None)], ids=["there already", "null"])
def test_row_that_breaks_a_constraint_is_an_integrity_error(engine: Engine, poison: dict[str, Any]) -> None:
    with engine.begin() as connection:
        INSERT.run_all(connection, [row("a")])
    with pytest.raises(IntegrityError) as caught, engine.begin() as connection:
        INSERT.run_all(connection, [poison])
    assert not is_transient(caught.value)
    with engine.begin() as connection:
        assert len(FIND.rows(connection, {"names": driver.texts(connection, ["a", "b"])})) == 1


def test_surrogate_is_pythons_own_error(engine: Engine) -> None:
    with engine.begin() as connection, pytest.raises(UnicodeEncodeError):
        INSERT.run_all(connection, [row("a", "\ud800")])


@only_postgresql
def test_nul_is_a_data_error(engine: Engine) -> None:
    with pytest.raises(DataError), engine.begin() as connection:
        INSERT.run_all(connection, [row("a", "\0")])


@only_postgresql
def test_lost_connection_is_transient_and_replaced(engine: Engine) -> None:
    with engine.connect() as connection:
        with pytest.raises(OperationalError) as caught, connection.begin():
            driver.execute(connection, "SELECT pg_terminate_backend(pg_backend_pid())")
        assert is_transient(caught.value)
        assert caught.value.connection_invalidated
        with connection.begin():
            INSERT.run_all(connection, [row("a")])
            assert len(FIND.rows(connection, {"names": ["a"]})) == 1


def test_wrong_statement_is_an_error_with_its_text(engine: Engine) -> None:
    wrong = Statement(lambda _: select(resolved.c.name).where(resolved.c.name == bindparam("name")))
    with pytest.raises(DBAPIError, match=r"SELECT resolved\.name"), engine.begin() as connection:
        wrong.run(connection, {"other": "a"})
