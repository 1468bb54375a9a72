"""A disk that can be filled and emptied: a small memory file system, or else a limit on the size of files."""

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from tests.processes import Process

BLOCK = bytes(4096)
# In a mount namespace of its own: as root, or as root of a user namespace. It is gone with the last process in it.
NAMESPACES = (("-m", ("-m",)), ("-Urm", ("-U", "-m", "--preserve-credentials")))
MOUNT = 'mount -t tmpfs -o size="$1",mode=777 chaos "$2" && touch "$2/there" && exec sleep infinity'


class Disk:
    """`prefix`: words before a command that is to use it. `path`: where it is, for that command.

    `says_full`: a write says ENOSPC, and not only that it failed.
    """

    kind = ""
    says_full = True
    prefix: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave no room; to be said again and again, since room may be made meanwhile."""
        raise NotImplementedError

    def empty(self) -> None:
        """Leave room again."""
        raise NotImplementedError


class MemoryDisk(Disk):
    """`view`: its path as seen from outside."""

    kind = "a tmpfs"

    def __init__(self, path: Path, prefix: tuple[str, ...], view: Path) -> None:
        super().__init__(path)
        self.prefix = prefix
        self._filler = view / "filler"

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(BLOCK):
                pass

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)


class SizeLimit(Disk):
    """For where nothing can be mounted: what these processes write beyond a page is refused with EFBIG."""

    kind = "RLIMIT_FSIZE"
    says_full = False

    def __init__(self, path: Path, pids: Callable[[], Iterable[int]]) -> None:
        super().__init__(path)
        self._pids = pids

    def fill(self) -> None:
        self._limit(len(BLOCK))

    def empty(self) -> None:
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@asynccontextmanager
async def memory_disk(directory: Path, size: int) -> AsyncIterator[MemoryDisk | None]:
    """A disk of this many bytes below the directory; None where mounting is not allowed."""
    place = directory / "disk"
    place.mkdir()
    for way, entry in NAMESPACES:
        holder = Process("disk", ["sh", "-c", MOUNT, "sh", str(size), str(place)], {}, directory, ("unshare", way))
        try:
            holder.start()
            view = Path(f"/proc/{holder.pid}/root{place}")
            if await _there(holder, view / "there"):
                yield MemoryDisk(place, ("nsenter", "-t", str(holder.pid), *entry, f"--wd={place}"), view)
                return
        except FileNotFoundError:
            break  # no util-linux
        finally:
            holder.kill()
    yield None


async def _there(holder: Process, sign: Path) -> bool:
    while holder.running():
        if os.access(sign, os.F_OK):
            return True
        await asyncio.sleep(0.01)
    return False
