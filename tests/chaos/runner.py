"""Runs one scenario, with a PostgreSQL of its own where it needs one."""

from contextlib import ExitStack
from dataclasses import replace

import uvloop

from tests.chaos.client import NoAnswer
from tests.chaos.monkey import BridgeBroken
from tests.chaos.options import CannotRun, Options
from tests.chaos.report import Report
from tests.chaos.scenarios import Scenario
from tests.postgres import LocalPostgres, PostgresError

FAILURES = (CannotRun, BridgeBroken, NoAnswer, FileExistsError, PostgresError, TimeoutError)


def run(scenario: Scenario, options: Options) -> Report | str:
    """The report, or why there is none."""
    found: Report | str = ""
    try:
        with ExitStack() as stack:
            if scenario.postgres and options.database_url is None:
                server = stack.enter_context(LocalPostgres(private=True))
                options = replace(options, database_url=server.url, postgres=server)
            found = uvloop.run(scenario(options))
    except* FAILURES as group:
        found = "; ".join(dict.fromkeys(_sentences(group)))
    return found


def _sentences(group: BaseExceptionGroup[BaseException]) -> list[str]:
    found = []
    for error in group.exceptions:
        found += _sentences(error) if isinstance(error, BaseExceptionGroup) else [str(error) or type(error).__name__]
    return found
