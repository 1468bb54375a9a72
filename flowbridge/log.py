"""Log lines: a stable `action` word, and the ids to grep for. On standard error, as text or JSON."""

import json
import logging
import sys
import time
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

_logger = logging.getLogger("flowbridge")
_noted: ContextVar[dict[str, Any] | None] = ContextVar("flowbridge_noted", default=None)


def setup(style: Literal["text", "json"], level: str) -> None:
    """Send all logging of the process through one handler."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Text())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # httpx prints whole query strings at INFO, tokens included; uvicorn's own lines repeat ours.
    for name in ("httpx", "httpcore", "uvicorn", "asyncio", "botocore", "boto3", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of each malformed form, which is answered 400: any caller could fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def begin() -> dict[str, Any]:
    """Returns the fields of one request's line: `note` adds to them, in this task and those that it starts."""
    fields: dict[str, Any] = {}
    _noted.set(fields)
    return fields


def note(**fields: Any) -> None:
    """Add fields to the line of the current request, if there is one."""
    noted = _noted.get()
    if noted is not None:
        noted.update(fields)


def info(action: str, **fields: Any) -> None:
    _say(logging.INFO, action, fields)


def warning(action: str, **fields: Any) -> None:
    _say(logging.WARNING, action, fields)


def error(action: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
    _say(logging.ERROR, action, fields, exc_info)


def _say(level: int, action: str, fields: dict[str, Any], exc_info: BaseException | None = None) -> None:
    if _logger.isEnabledFor(level):
        trace = (type(exc_info), exc_info, exc_info.__traceback__) if exc_info else None
        _logger.handle(_Record(level, action, fields, trace))


class _Record(logging.LogRecord):
    """A record without the caller's file, line, thread and process.

    A line per send is on the hot path; finding these would double its cost, and the action says where it comes from.
    """

    def __init__(self, level: int, action: str, fields: dict[str, Any], exc_info: Any) -> None:
        now = time.time()
        self.__dict__.update(_BLANK)
        self.msg = action
        self.fields = fields
        self.levelno, self.levelname = level, logging.getLevelName(level)
        self.created, self.msecs = now, now % 1 * 1000
        self.exc_info = exc_info


_BLANK = logging.LogRecord(_logger.name, logging.INFO, "", 0, "", None, None).__dict__


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname:<7} "
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is None:  # a library's line
            head += f"{record.name} message={json.dumps(record.getMessage())}"
        else:
            texts = [str(value) for value in fields.values()]
            if not _is_bare("".join(texts)):  # checked together: a line per send is on the hot path
                texts = [text if _is_bare(text) else json.dumps(text) for text in texts]
            head += record.msg + "".join([f" {name}={text}" for name, text in zip(fields, texts, strict=True)])
        if record.exc_info:  # indented, so that no text in it looks like another record
            head += "".join(f"\n    {line}" for line in self.formatException(record.exc_info).splitlines())
        return head


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        if fields is None:
            line |= {"action": record.name, "message": record.getMessage()}
        else:
            line |= {"action": record.msg, **fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC."""
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _is_bare(text: str) -> bool:
    """Whether a value needs no quotes in a text line: it can neither look like two values nor break the line."""
    return text.isascii() and text.isprintable() and " " not in text
