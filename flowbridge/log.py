"""Log lines: a stable `action` word, and the ids to grep for. On standard error, as text or JSON."""

import asyncio
import json
import logging
import sys
import time
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, TextIO

MAX_HELD = 100  # lines

_logger = logging.getLogger("flowbridge")
_root = logging.getLogger()
_noted: ContextVar[dict[str, Any] | None] = ContextVar("flowbridge_noted", default=None)


def setup(style: Literal["text", "json"], level: str) -> None:
    """Send all logging of the process through one handler."""
    logging.basicConfig(handlers=[_Lines(_Json() if style == "json" else _Text())], level=level.upper(), force=True)
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
        first = _root.handlers[0] if len(_root.handlers) == 1 else None
        if exc_info is None and type(first) is _Lines and not _logger.handlers:
            first.say(level, action, fields)
            return
        trace = (type(exc_info), exc_info, exc_info.__traceback__) if exc_info else None
        _logger.handle(_Record(level, action, fields, trace))


class _Record(logging.LogRecord):
    """A record without the caller's file, line, thread and process.

    Finding these would double its cost, and the action says where it comes from.
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
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is None:  # a library's line
            head = f"{_time(record.created)} {record.levelname:<7} {record.name}"
            head += f" message={json.dumps(record.getMessage())}"
        else:
            head = self.line(record.created, record.levelname, record.msg, fields)
        if record.exc_info:  # indented, so that no text in it looks like another record
            head += "".join(f"\n    {line}" for line in self.formatException(record.exc_info).splitlines())
        return head

    @staticmethod
    def line(created: float, level: str, action: str, fields: dict[str, Any]) -> str:
        texts = list(map(str, fields.values()))
        if not _is_bare("".join(texts)):  # checked together: a line per send is on the hot path
            texts = [text if _is_bare(text) else json.dumps(text) for text in texts]
        shown = "".join([f" {name}={text}" for name, text in zip(fields, texts, strict=True)])
        return f"{_time(created)} {level:<7} {action}{shown}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is None:
            line = {"action": record.name, "message": record.getMessage()}
        else:
            line = {"action": record.msg, **fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _ENCODER.encode({"time": _time(record.created), "level": record.levelname.lower(), **line})

    @staticmethod
    def line(created: float, level: str, action: str, fields: dict[str, Any]) -> str:
        return _ENCODER.encode({"time": _time(created), "level": level.lower(), "action": action, **fields})


_ENCODER = json.JSONEncoder(default=str)  # json.dumps makes one for each line


class _Lines(logging.StreamHandler[TextIO]):
    """The handler of `setup`, on standard error.

    A line of ours needs none of logging's layers while there is no other handler: no record, and no search for
    handlers. That is two thirds of its cost, and there is one for each send. Those of one turn of an event loop are
    written together; a warning, and what comes from elsewhere, is written at once, behind them.
    """

    def __init__(self, form: _Text | _Json) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(form)
        self._form = form
        self._held: list[str] = []
        self._held_by: asyncio.AbstractEventLoop | None = None  # which writes them soon

    def say(self, level: int, action: str, fields: dict[str, Any]) -> None:
        """Write what `emit` would for such a record without an exception."""
        try:
            line = self._form.line(time.time(), _LEVELS[level], action, fields)
            loop = asyncio._get_running_loop() if level == logging.INFO and len(self._held) < MAX_HELD else None
            with self.lock:  # type: ignore[union-attr]
                self._held.append(line)
                if loop is None or self._held_by not in (loop, None):
                    self.flush()
                elif self._held_by is None:
                    self._held_by = loop
                    loop.call_soon(self.flush)
        except Exception:
            self.handleError(_Record(level, action, fields, None))

    def emit(self, record: logging.LogRecord) -> None:
        self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Also at the end of the process, by logging itself."""
        with self.lock:  # type: ignore[union-attr]
            held, self._held, self._held_by = self._held, [], None
            try:
                if held:
                    self.stream.write("\n".join(held) + "\n")
                if not getattr(self.stream, "line_buffering", False):
                    self.stream.flush()
            except Exception:
                self.handleError(_Record(logging.INFO, "unwritten", {"lines": len(held)}, None))


_LEVELS = {level: logging.getLevelName(level) for level in (logging.INFO, logging.WARNING, logging.ERROR)}


def _time(created: float) -> str:
    """RFC 3339, UTC."""
    return f"{_second(int(created))}.{int(created % 1 * 1000):03d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _is_bare(text: str) -> bool:
    """Whether a value needs no quotes in a text line: it can neither look like two values nor break the line."""
    return text.isascii() and text.isprintable() and " " not in text
