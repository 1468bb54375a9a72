"""A body whose length is not known yet: a short one stays in memory, a long one goes to an unnamed temporary file."""

import asyncio
import tempfile
from collections.abc import AsyncIterator

from flowbridge.errors import Unavailable

IN_MEMORY = 256 * 1024
CHUNK = 64 * 1024


class Spool:
    """Written first, read then; `close` deletes the file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed by `close`)
        self.size = 0

    async def write(self, data: bytes) -> None:
        """Raises Unavailable when the disk is full."""
        self.size += len(data)
        try:
            if self.size <= IN_MEMORY:
                self._file.write(data)
            else:
                await asyncio.to_thread(self._file.write, data)
        except OSError as error:
            raise Unavailable(f"the file cannot be kept on its way: {error.strerror}") from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """What was written."""
        self._file.seek(0)
        while data := await asyncio.to_thread(self._file.read, CHUNK):
            yield data

    async def read(self) -> bytes:
        """What was written, in one piece."""
        return b"".join([data async for data in self.chunks()])

    def close(self) -> None:
        self._file.close()
