"""`flowbridge backup`: copy the SQLite database, and the key that the tokens in it are encrypted with."""

from datetime import UTC, datetime
from pathlib import Path

from flowbridge.cli import FAILED
from flowbridge.cli.terminal import say
from flowbridge.settings import Settings
from flowbridge.store import file_check
from flowbridge.store.backup import copy_database, copy_key
from flowbridge.store.errors import StoreError


def run(settings: Settings, path: Path) -> int:
    """Copy, and print the names of the copies; returns the exit code. Raises StoreError without a database."""
    file = settings.database_file
    if file is None:
        raise StoreError(
            "PostgreSQL is backed up with its own tools (pg_dump --format=custom, or an archive of its WAL): "
            "docs/reliability.md says how; FLOWBRIDGE_SECRET_KEY has to be kept, too"
        )
    file_check.require(file)
    if path.is_dir():
        path /= f"{file.stem}-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}{file.suffix}"
    try:
        copies = _copy(file, path, with_key=settings.secret_key is None)
    except StoreError as error:
        say(str(error))
        return FAILED
    print(*copies, sep="\n")
    if settings.secret_key is not None:
        say("FLOWBRIDGE_SECRET_KEY is not in it: keep that, too")
    return 0


def _copy(file: Path, path: Path, *, with_key: bool) -> list[Path]:
    key, key_copy = Path(f"{file}.key"), Path(f"{path}.key")
    if not (with_key and key.exists()):
        copy_database(file, path)
        return [path]
    copy_key(key, key_copy)  # first: a copy without its key looks whole
    try:
        copy_database(file, path)
    except StoreError:
        key_copy.unlink()
        raise
    return [path, key_copy]
