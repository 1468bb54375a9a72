"""Requests that come before the one ahead of them has been answered: kept as bytes, and read one by one.

uvicorn makes a request of each at once and queues them, 2,000 and more of one segment; with every answer it reads on,
however many are queued; and when the caller hangs up, only the last of them hears of it. As bytes they take no more
than they came with, what is wrong with one of them is said in its turn, and the one at work is the only one there is.
"""

import select

from uvicorn.protocols.http.flow_control import FlowControl

MAX_BEHIND = 64 * 1024  # bytes behind a request that has come whole; the caller's system keeps what is beyond
LOOK_SECONDS = 5.0  # while nothing is read: between two looks whether the caller has hung up

_LEFT = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere only a reset is seen
_END = b"\n\r\n"
_BREAKS = b"\r\n"


def end_of_piece(data: bytes, at: int) -> int:
    """Up to where a head or a chunked body may be read on from `at`: no request begins behind another one before there.

    Each of them ends in an empty line, which may have begun in the segment before. Not every empty line is such an end,
    but that does no harm: a parser may be given its bytes in any pieces. The blank lines that may stand before a
    request are taken along, else a flood of them were as many pieces.
    """
    if at == 0 and data[0] in _BREAKS:
        end = 0
    elif (found := data.find(_END, at)) >= 0:
        end = found + len(_END)
    else:
        return len(data)
    while end < len(data) and data[end] in _BREAKS:
        end += 1
    return end


def has_hung_up(file: int) -> bool:
    """Whether the other side has ended its connection, behind whatever of it has not been read."""
    poll = select.poll()
    poll.register(file, _LEFT)
    return bool(poll.poll(0))


class Flow(FlowControl):
    """uvicorn's own. While it is full nothing more is read: each handler that looks for a hang-up asks for that."""

    is_full = False

    def resume_reading(self) -> None:
        if self.read_paused and not self.is_full:
            super().resume_reading()
