"""Files of encrypted events: which of an event's files is meant, and what its author says of it. Pure.

Whoever may read the event may have its files decrypted: the key is in the event.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flowbridge.encryption.attachments import BadFile, EncryptedFile
from flowbridge.errors import BadGateway, BadRequest, Errcode, NotFound
from flowbridge.homeserver.sync import section
from flowbridge.services.media import attachment
from flowbridge.services.media.attachment import Label

Json = Mapping[str, Any]


def find(event: Json, uri: str) -> tuple[EncryptedFile, Label] | None:
    """The file of a decrypted event that has this `mxc://` address; None for one that is not encrypted.

    Raises NotFound when the event has no such file, or cannot be decrypted, and BadGateway for a file without a key.
    """
    if why := section(event, "flowbridge").get("undecryptable"):
        raise NotFound(f"the event cannot be decrypted: {why}", errcode=Errcode.NOT_FOUND)
    for content in (section(event, "content"), section(event, "content", "m.new_content")):
        for place, file, label in _files(content):
            if place == uri:
                return None if file is None else (_read(file), label)
    raise NotFound("the event has no file of this address", errcode=Errcode.NOT_FOUND)


def _files(content: Json) -> Iterator[tuple[object, Json | None, Label]]:
    """Address, encryption, name and type of each."""
    info = section(content, "info")
    name = content.get("filename") or content.get("body")
    yield content.get("url"), None, Label()
    yield info.get("thumbnail_url"), None, Label()
    if file := section(content, "file"):
        yield file.get("url"), file, _label(name, info.get("mimetype"))
    if file := section(info, "thumbnail_file"):
        yield file.get("url"), file, _label("", section(info, "thumbnail_info").get("mimetype"))


def _read(file: Json) -> EncryptedFile:
    try:
        return EncryptedFile.of(file)
    except BadFile as error:
        raise BadGateway(f"the event's file cannot be decrypted: {error}") from None


def _label(name: object, mimetype: object) -> Label:
    """As far as what anybody may have written can be a name and a type."""
    filename = type_ = ""
    with contextlib.suppress(BadRequest):
        filename = attachment.filename(name) if isinstance(name, str) else ""
    with contextlib.suppress(BadRequest):
        type_ = attachment.essence(attachment.content_type(mimetype)) if isinstance(mimetype, str) else ""
    return Label(filename, type_)
