"""Files that a command sends: checked before anything else is done, and copied before they are uploaded."""

import asyncio
import contextlib
import hashlib
import stat
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowbridge.cli import Usage
from flowbridge.errors import TooLarge
from flowbridge.homeserver.spool import Spool
from flowbridge.services.media import attachment
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.form import FormFile

PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class File:
    path: Path
    caption: str = ""

    def check(self) -> None:
        """Raises Usage for what cannot be read, and for an empty file. A pipe is not touched: it can be read once."""
        try:
            found = self.path.stat()
            if stat.S_ISREG(found.st_mode):
                self.path.open("rb").close()
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if stat.S_ISDIR(found.st_mode):
            raise Usage(f"--file: {self.path} is a folder: pack it, and send the archive")
        if stat.S_ISREG(found.st_mode) and not found.st_size:
            raise _empty(self.path)

    async def copied(self, spool: Spool, most: int) -> FormFile:
        """What it holds now: it may be a pipe, or be written to meanwhile. Raises Usage, and TooLarge beyond `most`."""
        digest = hashlib.sha256()
        try:
            with await asyncio.to_thread(self.path.open, "rb") as file:  # it waits for who writes into a named pipe
                while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                    digest.update(piece)
                    await spool.write(piece)
                    if spool.size > most:
                        raise TooLarge(f"{self.path}: the file is too large: at most {most} bytes may be uploaded")
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if not spool.size:
            raise _empty(self.path)
        name = attachment.filename(self.path.name, "--file")
        return FormFile(Label(name, Label(name).media_type), spool, digest.hexdigest(), self.caption)


def _empty(path: Path) -> Usage:
    return Usage(f"--file: {path} is empty")


def _unreadable(path: Path, error: OSError) -> Usage:
    return Usage(f"--file: cannot read {path}: {error.strerror}")


def named(paths: Sequence[Path], captions: Sequence[str]) -> list[File]:
    """The files, each with its caption: the first caption is the first file's. Raises Usage."""
    if len(captions) > len(paths):
        raise Usage("--caption: there are more captions than files")
    files = [File(path, caption) for path, caption in zip(paths, [*captions, *[""] * len(paths)], strict=False)]
    for file in files:
        file.check()
    return files


@contextlib.asynccontextmanager
async def copies(files: Sequence[File], most: int) -> AsyncIterator[list[FormFile]]:
    """Of all the files, for as long as the context lasts."""
    with contextlib.ExitStack() as stack:
        yield [await file.copied(stack.enter_context(contextlib.closing(Spool())), most) for file in files]
