"""Access tokens that Synapse answers 500 to. Pure.

Synapse reads a token that it does not know as a macaroon, as guests have (its `verify_guest_token`, with pymacaroons
0.13): in base64, a version, then packets. Where that library raises another error than a refusal, Synapse answers
500: to `None`, which a script without a token sends, as well as to tokens that an attacker makes up.
"""

import base64
from string import ascii_letters, digits
from typing import Final

_HEX: Final = b"0123456789abcdef"  # a macaroon of version 1 begins with the length of its first packet
_VERSION_2: Final = b"\2"
_OF_CAVEAT: Final = frozenset((b"vid", b"cl"))
_KEYS: Final = frozenset((b"location", b"identifier", b"cid", b"signature")) | _OF_CAVEAT
# The first characters of a byte of _HEX in base64; and those outside base64, which may precede it.
_BEGINS: Final = frozenset("MNOYZ")
_SKIPPED: Final = frozenset(map(chr, range(33, 127))) - set(ascii_letters + digits + "-_+/")


def breaks(token: str) -> bool:
    """Whether Synapse answers 500 to this unknown token. False for every token that a homeserver issues."""
    if token[:1] not in _BEGINS and token[:1] not in _SKIPPED:
        return False
    data = _decoded(token)
    if not data:
        return data is not None
    return data[0] in _HEX and _breaks_version_1(data)


def may_break(token: str) -> bool:
    """Whether Synapse may answer 500 to this; true of 1 in 3,000 random tokens, which may be valid."""
    data = _decoded(token)
    return data is not None and data[:1] == _VERSION_2 and _breaks_version_2(data[1:])


def _decoded(token: str) -> bytes | None:
    """Decoded as by Python's base64, which skips other characters; None where that fails."""
    try:
        return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except ValueError:
        return None


def _breaks_version_1(data: bytes) -> bool:
    at, has_caveat = 0, False
    while at < len(data):
        if len(data) - at < 4:
            return True
        try:
            length = int(data[at : at + 4], 16)
        except ValueError:
            return False
        if length <= 0:  # back to where it was: a 401 at best, and perhaps an endless loop
            return True
        key = data[at + 4 : at + length].split(b" ")[0]
        if key not in _KEYS:
            return False
        if key in _OF_CAVEAT and not has_caveat:
            return True
        has_caveat = has_caveat or key == b"cid"
        at += length
    return False


def _breaks_version_2(data: bytes) -> bool:
    """Whether a number of variable length has no end.

    A packet is a number for its kind and, unless that is 0, one for its length and so many bytes.
    """
    at, in_packet = 0, False
    while at < len(data) or in_packet:
        number, shift = 0, 0
        while True:
            if at >= len(data) or shift > 63:
                return True
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if in_packet:
            at += number
        in_packet = not in_packet and number != 0
    return False
