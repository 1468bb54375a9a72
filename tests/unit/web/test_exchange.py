"""A request's body on its way up: as a whole up to a limit, or piece by piece, but each byte once."""

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from flowbridge.web.exchange import Incoming

GONE: Message = {"type": "http.disconnect"}


def incoming(*pieces: bytes, is_whole: bool = True) -> Incoming:
    """A body in these pieces; after them the caller says no more, or hangs up."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = not is_whole
    left = iter(messages)

    async def receive() -> Message:
        return next(left, GONE)

    return Incoming(Request({"type": "http"}, receive), has_body=True)


async def all_of(body: Incoming) -> bytes:
    return b"".join([piece async for piece in body])


async def test_body_within_the_limit_is_whole() -> None:
    body = incoming(b"ab", b"", b"cd")
    assert not body.ended.is_set()
    assert await body.whole(4) == b"abcd"
    assert body.ended.is_set()
    assert await all_of(body) == b"abcd"


@pytest.mark.parametrize("limits", [(3,), (1, 3), (0, 1)])
async def test_longer_body_is_still_there_piece_by_piece(limits: tuple[int, ...]) -> None:
    body = incoming(b"ab", b"cd")
    assert [await body.whole(limit) for limit in limits] == [None] * len(limits)
    assert not body.ended.is_set()
    assert await all_of(body) == b"abcd"
    assert body.ended.is_set()


async def test_larger_limit_may_follow() -> None:
    body = incoming(b"ab", b"cd")
    assert await body.whole(1) is None
    assert await body.whole(4) == b"abcd"


async def test_caller_that_hangs_up_is_not_the_end_of_the_body() -> None:
    body = incoming(b"ab", is_whole=False)
    with pytest.raises(ClientDisconnect):
        await body.whole(10)
    with pytest.raises(ClientDisconnect):
        await all_of(incoming(b"ab", is_whole=False))
    assert not body.ended.is_set()
