"""Where a parser may be stopped so that it has read one request and no more, and whether a caller has hung up."""

import socket
from collections.abc import Iterator

import pytest

from flowbridge.web import pipelining, upgrade
from tests.patience import until

CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUESTS = {
    "head": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no-headers": b"GET / HTTP/1.1\r\n\r\n",
    "chunked": CHUNKED + b"3\r\n\r\n\r\r\n1;a=b\r\n\n\r\n0\r\n\r\n",
    "trailers": CHUNKED + b"a\r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\nX-Sum: 1\r\n\r\n",
}
BLANKS = (b"", b"\r\n", b"\n", b"\r\n\r\n", b"\r", b"\n\r\n\n")


class Events:
    """What a parser has found in each piece."""

    def __init__(self) -> None:
        self.pieces: list[list[str]] = []

    def on_message_begin(self) -> None:
        self.pieces[-1].append("begin")

    def on_message_complete(self) -> None:
        self.pieces[-1].append("end")


def pieces(segments: list[bytes]) -> list[list[str]]:
    """What a parser finds that is given these segments in pieces."""
    events = Events()
    parser = upgrade.parser(events)
    for segment in segments:
        at = 0
        while at < len(segment):
            end = pipelining.end_of_piece(segment, at)
            assert at < end <= len(segment)
            events.pieces.append([])
            parser.feed_data(segment[at:end])
            at = end
    return events.pieces


def ways(data: bytes) -> Iterator[list[bytes]]:
    """This in one segment, in two of every kind, in three near each other, and byte by byte."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for first in range(1, len(data)):
        yield [data[:first], data[first:]]
        for second in range(first + 1, min(first + 5, len(data))):
            yield [data[:first], data[first:second], data[second:]]


@pytest.mark.parametrize("blanks", BLANKS)
@pytest.mark.parametrize("name", REQUESTS)
def test_no_request_begins_in_the_piece_in_which_another_one_ends(name: str, blanks: bytes) -> None:
    for other in REQUESTS.values():
        for segments in ways(blanks + REQUESTS[name] + blanks + other):
            found = pieces(segments)
            assert [event for piece in found for event in piece] == ["begin", "end"] * 2
            assert ["end", "begin"] not in [piece[-2:] for piece in found], segments


def test_flood_of_blank_lines_is_one_piece() -> None:
    """Between two requests and before the first one; a piece for each would stop the event loop."""
    blanks = b"\r\n" * 100_000
    assert len(pieces([blanks + REQUESTS["head"] + blanks + REQUESTS["head"] + blanks])) == 3


def test_hang_up_behind_unread_bytes_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            caller.sendall(b"unread")
            assert not pipelining.has_hung_up(accepted.fileno())
            caller.close()
            until(lambda: pipelining.has_hung_up(accepted.fileno()))
