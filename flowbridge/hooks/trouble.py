"""What a hook's sender hears of trouble that is not its own: a 503, and when to come again.

Alertmanager drops what is answered 429, or any other 4xx, for good; and then never sends `resolved` either.
"""

import contextlib
from collections.abc import Iterator

from flowbridge.errors import BadRequest, MatrixError, TooLarge, Unavailable, UnsupportedMedia

RETRY_MS = 5_000  # where an error does not say itself when to come again


@contextlib.contextmanager
def ours(*, whole: bool = False) -> Iterator[None]:
    """Raises Unavailable for every error but those of a body that can never be taken.

    `whole`: for those, too: the body is known to be right.
    """
    try:
        yield
    except MatrixError as error:
        is_never = isinstance(error, BadRequest | TooLarge | UnsupportedMedia)
        if (isinstance(error, Unavailable) and error.status == 503) or (is_never and not whole):
            raise
        pause = error.extra.get("retry_after_ms")
        raise Unavailable(error.error, retry_after_ms=pause if isinstance(pause, int) else RETRY_MS) from None
