"""What the scenarios attack the store with: that it does what it says."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.chaos.cable import Cable
from tests.chaos.disk import SizeLimit, memory_disk
from tests.patience import PATIENCE


@asynccontextmanager
async def _echo() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            while data := await reader.read(100):
                heard.append(data)
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


heard: list[bytes] = []
wires: list["Wire"] = []


class Wire:
    """A client at the near end of a cable."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        wires.append(self)

    @classmethod
    async def to(cls, cable: Cable) -> "Wire":
        port = int(cable.url("postgresql+psycopg://me@host/db").rpartition(":")[2].partition("/")[0])
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, word: bytes, seconds: float = PATIENCE) -> bytes:
        self.writer.write(word)
        return await asyncio.wait_for(self.reader.read(100), seconds)


@pytest.fixture
async def cable() -> AsyncIterator[Cable]:
    async with _echo() as port:
        made = Cable("127.0.0.1", port)
        await made.plug()
        yield made
        made.unplug()
        while wires:
            wires.pop().writer.close()


async def test_cable_carries_until_it_is_cut(cable: Cable) -> None:
    wire = await Wire.to(cable)
    assert await wire.ask(b"one") == b"one"
    cable.cut()
    with pytest.raises(ConnectionResetError):
        await wire.ask(b"two")
    assert await (await Wire.to(cable)).ask(b"three") == b"three"


async def test_frozen_cable_keeps_what_it_was_given(cable: Cable) -> None:
    wire = await Wire.to(cable)
    assert await wire.ask(b"one") == b"one"
    cable.freeze()
    with pytest.raises(TimeoutError):
        await wire.ask(b"two", 0.1)
    cable.thaw()
    assert await asyncio.wait_for(wire.reader.read(100), PATIENCE) == b"two"


async def test_deaf_cable_carries_requests_and_no_answers(cable: Cable) -> None:
    wire = await Wire.to(cable)
    cable.deafen()
    word = os.urandom(8)
    with pytest.raises(TimeoutError):
        await wire.ask(word, 0.2)
    assert word in heard


async def test_unplugged_cable_refuses_and_is_plugged_in_again_at_its_port(cable: Cable) -> None:
    wire = await Wire.to(cable)
    cable.unplug()
    with pytest.raises(ConnectionResetError):
        await wire.ask(b"one")
    with pytest.raises(ConnectionRefusedError):
        await Wire.to(cable)
    await cable.plug()
    assert await (await Wire.to(cable)).ask(b"two") == b"two"


async def test_memory_disk_is_full_until_it_is_emptied(tmp_path: Path) -> None:
    async with memory_disk(tmp_path, 1024 * 1024) as disk:
        if disk is None:
            pytest.skip("mounting a file system is not allowed here")
        write = f"open({str(disk.path / 'file')!r}, 'ab', 0).write(bytes(65536))"
        command = [*disk.prefix, sys.executable, "-c", write]
        assert await _error(command) == ""
        disk.fill()
        assert "No space left on device" in await _error(command)
        disk.empty()
        assert await _error(command) == ""
    assert list((tmp_path / "disk").iterdir()) == []


async def _error(command: list[str]) -> str:
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE)
    return done.stderr


def test_size_limit_stops_a_process_from_writing_until_it_is_lifted(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "file = open(sys.argv[1], 'ab', 0)\n"
        "for _ in sys.stdin:\n"
        "    try: print(file.write(bytes(8192)), flush=True)\n"
        "    except OSError as error: print(error.strerror, flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        disk = SizeLimit(tmp_path, lambda: [process.pid])

        def write() -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        assert write() == "8192"
        disk.fill()
        assert write() == "File too large"
        disk.empty()
        assert write() == "8192"
        process.kill()
