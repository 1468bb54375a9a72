"""What the first bytes of a file say of it: its type, whether that is what its label says, a picture's size. Pure."""

import io
from collections.abc import Mapping
from typing import Final

HEAD_BYTES: Final = 256 * 1024  # a camera's JPEG holds its size behind a preview of up to 64 KiB, or several

# Where a file of a type has these bytes (https://mimesniff.spec.whatwg.org, and ISO 14496-12 for `ftyp`).
_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"),
    (8, b"WEBPVP", "image/webp"),
    (0, b"BM", "image/bmp"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (0, b"OggS", "audio/ogg"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"fLaC", "audio/flac"),
    (8, b"WAVE", "audio/wav"),
    (0, b"%PDF-", "application/pdf"),
    (0, b"PK\x03\x04", "application/zip"),
    (0, b"\x1f\x8b", "application/gzip"),
)
_PICTURES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/avif"})
_PAGES: Final = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script")  # of a login, an error …
_NO_PAGES: Final = ("image/", "audio/", "video/", "application/pdf", "application/zip")


def media_type(head: bytes) -> str:
    """The type that the bytes show; empty for text and for what is not in the table."""
    for offset, signature, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    return ""


def contradiction(head: bytes, label: str) -> str:
    """Why these cannot be the first bytes of a file of this type; empty when they can."""
    kind = label.partition(";")[0].strip().lower()
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:20].lower()
    if kind.startswith(_NO_PAGES) and kind != "image/svg+xml" and begins.startswith(_PAGES):
        return f"is not {kind} but a web page, perhaps a login or an error"
    shown = media_type(head)
    if kind in _PICTURES and shown != kind:
        return f"is not {kind}" + (f" but {shown}" if shown else "")
    return ""


def info(head: bytes, size: int) -> Mapping[str, int]:
    """`size`, and a picture's `w` and `h` as it is shown, for `info` of an event."""
    if media_type(head) in _PICTURES:
        import imagesize  # with an XML parser, which most bridges never need

        width, height = imagesize.get(io.BytesIO(head))
        if 0 < width < 2**31 and 0 < height < 2**31:
            return {"size": size, "w": int(width), "h": int(height)}
    return {"size": size}
