"""The options of a run."""

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from tests.chaos.load import Mode
from tests.postgres import LocalPostgres

REQUEST_SECONDS = 10.0  # what a bridge gives a request by default
MARGIN_SECONDS = 5.0  # by which a lease must outlive a request


class CannotRun(Exception):
    """This scenario needs something that is not there; the message says what."""


@dataclass(frozen=True)
class Options:
    """Times in seconds.

    `bridge`: the command, with {port} in it. `environment`: settings more for it. `prefix`: words before it, which
    may take it elsewhere. `postgres`: the server of `database_url`, when it is ours to end. `events`: for each room of
    `drain`. `patience`: how long the drain may stand still, which must be more than a bridge's longest pause between
    two tries. `drain`: how long it may take in all. `quiet`: how long nothing more may come at its end. `progress`:
    between two lines; 0: none.
    """

    seconds: float = 60.0
    bridge: str = f"{shlex.quote(sys.executable)} -m flowbridge serve --port {{port}}"
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    database_url: str | None = None
    postgres: LocalPostgres | None = None
    rooms: int = 32
    fire: int = 4
    states: int = 4
    matrix: int = 4
    hooks: int = 0
    mode: Mode = "mixed"
    kills: int | None = None
    every: float = 3.0
    lease: float | None = None
    latency: float = 0.0
    remember: float = 30.0
    rate: float | None = None
    events: int = 100
    patience: float = 90.0
    drain: float = 900.0
    quiet: float = 5.0
    progress: float = 0.0
    seed: int = 1
    directory: Path | None = None
    keep: bool = False

    def leased(self, seconds: float) -> Self:
        """With this lease unless another was given; the bridges get it with a request timeout that fits into it."""
        lease = self.lease or seconds
        request = min(REQUEST_SECONDS, max(0.5, lease - MARGIN_SECONDS))
        settings = {"FLOWBRIDGE_LEASE_SECONDS": f"{lease:g}", "FLOWBRIDGE_REQUEST_SECONDS": f"{request:g}"}
        return replace(self, lease=lease, environment=settings | self.environment)

    def with_settings(self, **settings: str) -> Self:
        """With settings for the bridges, unless others were given."""
        return replace(self, environment=settings | self.environment)

    @property
    def shared_url(self) -> str:
        """The database that replicas share. Raises CannotRun."""
        if self.database_url is None:
            raise CannotRun("several replicas share one PostgreSQL: name it with --database-url")
        return self.database_url

    @property
    def own_postgres(self) -> LocalPostgres:
        """The server behind it, to end and start. Raises CannotRun."""
        if self.postgres is None:
            raise CannotRun("this scenario ends its PostgreSQL: it needs one of its own, without --database-url")
        return self.postgres
