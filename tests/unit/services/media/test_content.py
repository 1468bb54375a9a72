"""flowbridge.services.media.content: what the first bytes of a file say."""

import io

import pytest
from PIL import Image

from flowbridge.services.media import content

PAGE = b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Please log in</body></html>"


def picture(kind: str, size: tuple[int, int] = (320, 200)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "AVIF"])
def test_picture_is_recognised_and_measured(kind: str) -> None:
    head = picture(kind)
    assert content.media_type(head) == f"image/{kind.lower()}"
    assert content.contradiction(head, f"image/{kind.lower()}") == ""
    assert content.info(head, len(head)) == {"size": len(head), "w": 320, "h": 200}


def test_picture_that_a_camera_took_upright_is_measured_as_it_is_shown() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (320, 200)).save(file, "JPEG", exif=exif)
    assert content.info(file.getvalue(), 1) == {"size": 1, "w": 200, "h": 320}


@pytest.mark.parametrize(
    ("head", "label", "reason"),
    [
        (PAGE, "image/png", "is not image/png but a web page, perhaps a login or an error"),
        (PAGE, "application/pdf", "is not application/pdf but a web page, perhaps a login or an error"),
        (b"<script>", "video/mp4", "is not video/mp4 but a web page, perhaps a login or an error"),
        (b"GIF89a....", "image/png", "is not image/png but image/gif"),
        (b"plain text", "IMAGE/PNG; x=y", "is not image/png"),
        (b"%PDF-1.7", "image/jpeg", "is not image/jpeg but application/pdf"),
    ],
)
def test_file_that_is_not_what_it_says_is_told(head: bytes, label: str, reason: str) -> None:
    assert content.contradiction(head, label) == reason


@pytest.mark.parametrize(
    ("head", "label"),
    [
        (PAGE, "text/html"),
        (PAGE, "application/octet-stream"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        (b"anything", "image/x-unknown"),
        (b"anything", "application/octet-stream"),
        (b"ID3....", "audio/mpeg"),
    ],
)
def test_what_may_be_so_is_not_doubted(head: bytes, label: str) -> None:
    assert content.contradiction(head, label) == ""


@pytest.mark.parametrize("head", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + b"\xff\xe0\x00\x02" * 9, PAGE])
def test_what_is_no_picture_has_a_size_in_bytes_alone(head: bytes) -> None:
    assert content.info(head, 7) == {"size": 7}


def test_svg_is_not_measured_since_that_would_parse_its_xml() -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><svg width="&a;"/>'
    assert content.info(bomb, 1) == {"size": 1}
