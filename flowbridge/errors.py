"""The errors that a caller is answered with.

    MatrixError
      · BadRequest          400  (M_BAD_JSON, M_NOT_JSON, M_INVALID_PARAM)
      · Unauthorized        401
      · Forbidden           403  an API key that does not cover this
      · NotFound            404
      · MethodNotAllowed    405
      · WrongState          409  a delivery that cannot be replayed, or deleted, at present
      · Conflict            422
      · TooLarge            413
      · UnsupportedMedia    415
      · TooMany             429  one caller's share of a bound is taken
      · HomeserverError          the homeserver's own status and errcode
      · Unavailable         503  the store is full, or away
      · BadGateway          502  the homeserver is away, or is not a homeserver
      · GatewayTimeout      504

Every answer has the one shape of the Matrix client-server API, "Standard error response":
`{"errcode": "M_…", "error": "a sentence", …}`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MAX_RETRY_SECONDS = 86_400


class Errcode(StrEnum):
    """The errcodes of flowbridge itself; a homeserver's own pass through unchanged."""

    BAD_JSON = "M_BAD_JSON"  # JSON, but not valid for this event type
    BAD_STATE = "M_BAD_STATE"  # the request cannot be served in the present state
    FORBIDDEN = "M_FORBIDDEN"
    INVALID_PARAM = "M_INVALID_PARAM"  # a path segment, query value or header is malformed
    INVALID_USERNAME = "M_INVALID_USERNAME"
    LIMIT_EXCEEDED = "M_LIMIT_EXCEEDED"
    MISSING_TOKEN = "M_MISSING_TOKEN"  # noqa: S105 (a name, not a secret)
    NOT_FOUND = "M_NOT_FOUND"
    NOT_JSON = "M_NOT_JSON"  # the body could not be read as JSON
    TOO_LARGE = "M_TOO_LARGE"
    UNKNOWN = "M_UNKNOWN"
    UNKNOWN_TOKEN = "M_UNKNOWN_TOKEN"  # noqa: S105 (a name, not a secret)
    UNRECOGNIZED = "M_UNRECOGNIZED"  # no such path, or not with this method


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a payload.

    `pointer` is an RFC 6901 JSON Pointer into the event's content, for a missing key to where it should be. `schema`
    names the schema that is violated (`m.room.message$m.image`), or the general rule (`json`).
    """

    pointer: str
    message: str
    schema: str


class MatrixError(Exception):
    """An answer of the form `{"errcode", "error", …}`."""

    status = 500
    errcode: str = Errcode.UNKNOWN
    sent = False  # whether the homeserver may have served the request nevertheless

    def __init__(self, error: str, *, errcode: str | None = None, status: int | None = None, **extra: Any) -> None:
        super().__init__(error)
        self.error = error
        self.status = status or self.status
        self.errcode = errcode or self.errcode
        self.extra: Mapping[str, Any] = extra

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"errcode": self.errcode, "error": self.error, **self.extra}

    def headers(self) -> dict[str, str]:
        """The headers of the answer: `Retry-After` (seconds, rounded up) beside `retry_after_ms`."""
        pause = self.extra.get("retry_after_ms")
        return {"Retry-After": str(min(max(0, -(-pause // 1000)), MAX_RETRY_SECONDS))} if isinstance(pause, int) else {}


class BadRequest(MatrixError):
    status = 400
    errcode = Errcode.INVALID_PARAM


class BadContent(BadRequest):
    """400 for a payload, with all problems that were found, and the keys beside the content that have no effect."""

    errcode = Errcode.BAD_JSON

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        error: str | None = None,
        errcode: str | None = None,
        ignored: Sequence[str] = (),
    ) -> None:
        first = problems[0]
        where = f" at {first.pointer}" if first.pointer else ""
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        self.unquoted = f"{first.schema}: wrong{where}{more}"  # without what the payload says
        super().__init__(
            error or f"{first.schema}: {first.message}{where}{more}",
            errcode=errcode,
            flowbridge={
                "problems": [asdict(problem) for problem in problems],
                **({"ignored": list(ignored)} if ignored else {}),
            },
        )
        self.problems = problems


class NotJson(BadRequest):
    errcode = Errcode.NOT_JSON


class Unauthorized(MatrixError):
    status = 401
    errcode = Errcode.UNKNOWN_TOKEN


class Forbidden(MatrixError):
    status = 403
    errcode = Errcode.FORBIDDEN


class NotFound(MatrixError):
    status = 404
    errcode = Errcode.UNRECOGNIZED


class MethodNotAllowed(MatrixError):
    status = 405
    errcode = Errcode.UNRECOGNIZED


class WrongState(MatrixError):
    status = 409
    errcode = Errcode.BAD_STATE


class Conflict(MatrixError):
    """A key that was used before, with other content."""

    status = 422
    errcode = Errcode.INVALID_PARAM


class Unavailable(MatrixError):
    """Nothing is accepted at the moment; the caller should try again."""

    status = 503

    def __init__(self, error: str, *, retry_after_ms: int = 1_000) -> None:
        super().__init__(error, retry_after_ms=retry_after_ms)


class HeldElsewhere(Unavailable):
    """Another process of the bridge has the device that is to encrypt this."""


class TooLarge(MatrixError):
    status = 413
    errcode = Errcode.TOO_LARGE


class TooMany(MatrixError):
    """More than a bound, or one caller's share of it, allows at once."""

    status = 429
    errcode = Errcode.LIMIT_EXCEEDED

    def __init__(self, error: str, *, retry_after_ms: int) -> None:
        super().__init__(error, retry_after_ms=retry_after_ms)


class UnsupportedMedia(MatrixError):
    status = 415
    errcode = Errcode.NOT_JSON


class HomeserverError(MatrixError):
    """The homeserver's own answer, passed on unchanged."""


class BadGateway(MatrixError):
    status = 502


class GatewayTimeout(MatrixError):
    status = 504
