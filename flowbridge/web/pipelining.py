"""Pipelined requests, which arrive before the one ahead of them is answered: kept as bytes, and read one by one.

uvicorn starts and queues them at once, 2,000 and more of one TCP segment. It reads on with every answer, however many
are queued, and only the last of them learns that the caller has hung up. As bytes they take no more memory than they
arrived with, and an error in one of them is reported in its turn.
"""

import re
import select

from uvicorn.protocols.http.flow_control import FlowControl

MAX_BEHIND = 64 * 1024  # bytes behind a complete request; the rest stays in the caller's socket buffer

_HUNG_UP = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere only a reset is seen
_END = b"\n\r\n"
_BREAKS = b"\r\n"
_BLANKS = re.compile(rb"[\r\n]+")


def end_of_piece(data: bytes, at: int) -> int:
    """How far the parser may read a head or a chunked body from `at` without beginning the request behind it.

    Each of them ends in an empty line, which may have begun in the segment before. An empty line that is not such an
    end does no harm, since a parser takes its bytes in any pieces. The blank lines that may stand before a request
    belong to the piece, else a flood of them would be as many pieces.
    """
    if at == 0 and data[0] in _BREAKS:
        end = 0
    elif (found := data.find(_END, at)) >= 0:
        end = found + len(_END)
    else:
        return len(data)
    if end < len(data) and (blanks := _BLANKS.match(data, end)):  # byte by byte, 1 MiB took 0.3 s of the event loop
        end = blanks.end()
    return end


def has_hung_up(file: int) -> bool:
    """Whether the other side has closed its connection, whatever of it has not been read yet."""
    poll = select.poll()
    poll.register(file, _HUNG_UP)
    return bool(poll.poll(0))


class Flow(FlowControl):
    """uvicorn's, but reading stays paused while it is full: a handler that waits for a hang-up would resume it."""

    is_full = False

    def resume_reading(self) -> None:
        if self.read_paused and not self.is_full:
            super().resume_reading()
