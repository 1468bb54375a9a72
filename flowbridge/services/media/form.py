"""A message as a form with files: its fields in memory, its files on the disk, for as long as they are needed."""

import contextlib
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from flowbridge.errors import BadContent, BadRequest, Problem, TooLarge
from flowbridge.events.canonical_json import pointer
from flowbridge.events.payload import decoded
from flowbridge.homeserver.spool import Spool
from flowbridge.services.media.attachment import Label
from flowbridge.services.media.multipart import Parts, Sink, field_name, file_label

MAX_PARTS = 50
MAX_FILES = 20
FIELD_BYTES = 512 * 1024  # of all fields, and of what is around the parts
RULE = "message"

MakeSpool = Callable[[], AbstractAsyncContextManager[Spool]]


@dataclass(eq=False)
class FormFile:
    """A file of a form. `sha256`: of its bytes, in hex, once the form has been read."""

    label: Label
    spool: Spool
    sha256: str = ""


@dataclass
class Form:
    """`fields`: names and texts, in their order."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[FormFile] = field(default_factory=list)


@contextlib.asynccontextmanager
async def read(body: AsyncIterable[bytes], content_type: str, spool: MakeSpool, most: int) -> AsyncIterator[Form]:
    """Read a form whose files have `most` bytes at most, each. Raises BadRequest, TooLarge, and what `spool` raises."""
    async with contextlib.AsyncExitStack() as stack:
        reader = _Reader(content_type)
        size = 0
        async for data in body:
            size += len(data)
            for index, piece in reader.feed(data):
                if index == len(reader.form.files):
                    file = FormFile(reader.labels[index], await stack.enter_async_context(spool()))
                    reader.form.files.append(file)
                file = reader.form.files[index]
                await file.spool.write(piece)
                if file.spool.size > most:
                    raise TooLarge(f"{file.label.filename}: the file is larger than {most} bytes")
            if size > sum(file.spool.size for file in reader.form.files) + FIELD_BYTES:
                raise TooLarge(f"the fields of the form are longer than {FIELD_BYTES} bytes")
        yield reader.end()


class _Reader:
    def __init__(self, content_type: str) -> None:
        self.form = Form()
        self.labels: list[Label] = []
        self._parts = Parts(content_type, self._begin)
        self._texts: list[tuple[str, str, bytearray]] = []  # name, Content-Type, value
        self._hashes: list[hashlib._Hash] = []
        self._pieces: list[tuple[int, bytes]] = []  # of files

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The pieces of files in this piece of the body: the file's number, and bytes (none, where it begins)."""
        self._pieces = []
        self._parts.feed(data)
        return self._pieces

    def end(self) -> Form:
        self._parts.end()
        for file, digest in zip(self.form.files, self._hashes, strict=True):
            file.sha256 = digest.hexdigest()
        # A browser sends a field for a file that nobody chose: without a name, and empty.
        self.form.files = [file for file in self.form.files if file.spool.size or file.label.filename]
        for number, file in enumerate(self.form.files):
            if not file.spool.size:
                raise BadContent([Problem(pointer("/attachments", number), f"{file.label.filename} is empty", RULE)])
        self.form.fields = [(name, decoded(bytes(value), kind)) for name, kind, value in self._texts]
        return self.form

    def _begin(self, headers: dict[str, str]) -> Sink:
        if len(self._texts) + len(self.labels) >= MAX_PARTS:
            raise BadRequest(f"the form holds more than {MAX_PARTS} parts")
        label = file_label(headers)
        if label is None:
            value = bytearray()
            self._texts.append((field_name(headers), headers.get("content-type", ""), value))
            return value.extend
        if len(self.labels) >= MAX_FILES:
            raise BadRequest(f"the form holds more than {MAX_FILES} files: send the others with another message")
        number, digest = len(self.labels), hashlib.sha256()
        self.labels.append(label)
        self._hashes.append(digest)
        self._pieces.append((number, b""))

        def take(data: bytes) -> None:
            digest.update(data)
            self._pieces.append((number, data))

        return take
