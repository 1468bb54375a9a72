"""What a hook's sender hears of trouble that is not its own: a 503, and when to come again.

Alertmanager drops what is answered 429, or any other 4xx, for good; and then never sends `resolved` either.
"""

from types import TracebackType

from flowbridge.errors import BadRequest, MatrixError, TooLarge, Unavailable, UnsupportedMedia

RETRY_MS = 5_000  # where an error does not say itself when to come again


class ours:  # noqa: N801 (it is used as a function; contextlib's would take 2 µs more, four times a request)
    """Raises Unavailable for every error but those of a body that can never be taken.

    `whole`: for those, too: the body is known to be right.
    """

    __slots__ = ("_whole",)

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole

    def __enter__(self) -> None: ...

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if not isinstance(error, MatrixError) or (isinstance(error, Unavailable) and error.status == 503):
            return
        if isinstance(error, BadRequest | TooLarge | UnsupportedMedia) and not self._whole:
            return
        pause = error.extra.get("retry_after_ms")
        raise Unavailable(error.error, retry_after_ms=pause if isinstance(pause, int) else RETRY_MS) from None
