"""flowbridge.log: one line each, text or JSON, and none from libraries that print query strings."""

import asyncio
import contextlib
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbridge import log
from flowbridge.errors import BadRequest
from flowbridge.services.media.multipart import Parts

Style = Literal["text", "json"]
STYLES: tuple[Style, ...] = ("text", "json")
QUIET = ("httpx", "httpcore", "uvicorn", "asyncio", "botocore", "boto3", "urllib3", "python_multipart")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@contextlib.contextmanager
def logging_as(style: Style, level: str = "info") -> Iterator[io.StringIO]:
    """What is logged meanwhile; afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("root", *QUIET)}
    flags = logging.logThreads, logging.logProcesses, logging.logMultiprocessing
    root.handlers.clear()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            log.setup(style, level)
            yield stderr
    finally:
        root.handlers[:] = handlers
        logging.logThreads, logging.logProcesses, logging.logMultiprocessing = flags
        for name, before in levels.items():
            logging.getLogger(None if name == "root" else name).setLevel(before)


def test_text_line_has_time_level_action_and_fields() -> None:
    with logging_as("text") as stderr:
        log.info("sent", room="!a:b", status=200, ms=1.5, none=None)
    assert re.fullmatch(rf"{TIME} INFO    sent room=!a:b status=200 ms=1\.5 none=None\n", stderr.getvalue())


def test_json_line_has_time_level_action_and_fields() -> None:
    with logging_as("json") as stderr:
        log.warning("sent", room="!é:b", status=200, path=Path("/x"), error=ValueError("no"))
    line = json.loads(stderr.getvalue())
    assert re.fullmatch(TIME, line.pop("time"))
    assert line == {"level": "warning", "action": "sent", "room": "!é:b", "status": 200, "path": "/x", "error": "no"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("/rooms/!a:b/send", "/rooms/!a:b/send"),
        ("two words", '"two words"'),
        ("a\nb", r'"a\nb"'),
        ("a\r\nb", r'"a\r\nb"'),
        ("tab\t", r'"tab\t"'),
        ("é", r'"\u00e9"'),
        ("\x85\u2028", r'"\u0085\u2028"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("\ud800", r'"\ud800"'),
    ],
)
def test_text_value_that_could_break_the_line_is_quoted(value: str, shown: str) -> None:
    with logging_as("text") as stderr:
        log.info("seen", value=value)
    assert stderr.getvalue().endswith(f" seen value={shown}\n")


@pytest.mark.parametrize("style", STYLES)
def test_newline_cannot_make_a_second_line(style: Style) -> None:
    forged = "x\n2026-01-01T00:00:00.000Z INFO    forged\r\u2028\x85\x0b\x0cend"
    with logging_as(style) as stderr:
        log.info("seen", value=forged)
        log.error("failed", error=ValueError(forged))
        logging.getLogger("library").warning("says %s", forged)
    assert len(stderr.getvalue().splitlines()) == 3


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(STYLES), st.dictionaries(st.sampled_from(["a", "b"]), st.text() | st.binary() | st.integers()))
def test_any_fields_make_exactly_one_line(style: Style, fields: dict[str, Any]) -> None:
    with logging_as(style) as stderr:
        log.info("seen", **fields)
    assert len(stderr.getvalue().splitlines()) == 1


def test_exception_follows_in_text_with_its_traceback() -> None:
    with logging_as("text") as stderr:
        try:
            raise ValueError("broken")
        except ValueError as error:
            log.error("internal_error", exc_info=error, path="/x")
    head, *trace = stderr.getvalue().splitlines()
    assert head.endswith(" ERROR   internal_error path=/x")
    assert "Traceback" in trace[0]
    assert trace[-1].strip() == "ValueError: broken"
    assert any("test_exception_follows_in_text" in line for line in trace)


def test_exception_is_part_of_the_json_line() -> None:
    with logging_as("json") as stderr:
        try:
            raise ValueError("broken")
        except ValueError as error:
            log.error("internal_error", exc_info=error)
            logging.getLogger("library").exception("gave up")
    first, second = (json.loads(line) for line in stderr.getvalue().splitlines())
    assert (first["action"], second["action"], second["message"]) == ("internal_error", "library", "gave up")
    assert all(line["exception"].endswith("ValueError: broken") for line in (first, second))


def test_level_is_a_threshold() -> None:
    with logging_as("text", "warning") as stderr:
        log.info("quiet")
        log.warning("loud")
        log.error("louder")
    assert [line.split()[2] for line in stderr.getvalue().splitlines()] == ["loud", "louder"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "name", ["httpx", "httpcore.http11", "uvicorn.access", "uvicorn.error", "botocore", "urllib3.connectionpool"]
)
@pytest.mark.parametrize("level", ["debug", "info"])
def test_library_that_prints_addresses_is_silent_below_warning(
    monkeypatch: pytest.MonkeyPatch, name: str, style: Style, level: str
) -> None:
    monkeypatch.setattr(logging.getLogger(name), "propagate", True)  # a server in another test took uvicorn's away
    with logging_as(style, level) as stderr:
        logging.getLogger(name).debug("GET /?access_token=canary")
        logging.getLogger(name).info("GET /?access_token=canary")
        assert stderr.getvalue() == ""
        logging.getLogger(name).warning("trouble")
    assert "trouble" in stderr.getvalue()


@pytest.mark.parametrize("level", ["debug", "info"])
def test_malformed_form_writes_no_line(level: str) -> None:
    with logging_as("text", level) as stderr:
        with pytest.raises(BadRequest, match="is not multipart/form-data"):
            Parts("multipart/form-data; boundary=x", lambda _: None).feed(b"no form")
        assert stderr.getvalue() == ""
        logging.getLogger("python_multipart.multipart").error("trouble")
    assert "trouble" in stderr.getvalue()


def test_line_of_a_library_is_quoted_and_names_it() -> None:
    with logging_as("text") as stderr:
        logging.getLogger("library").warning("two\nlines %d", 1)
    assert stderr.getvalue().endswith(' WARNING library message="two\\nlines 1"\n')


def test_second_setup_replaces_the_first() -> None:
    with logging_as("json") as stderr:
        log.setup("text", "info")
        log.info("once")
    assert stderr.getvalue().endswith(" INFO    once\n")
    assert stderr.getvalue().count("once") == 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("value", [1.5, None, "two words", "é\n", Path("/x")])
def test_line_is_the_same_whether_or_not_another_handler_listens(style: Style, value: object) -> None:
    logger, other = logging.getLogger("flowbridge"), logging.NullHandler()
    with logging_as(style) as stderr:
        for say in (log.info, log.warning, log.error):
            say("seen", value=value)
        logger.addHandler(other)  # then a line takes all of logging's layers
        try:
            for say in (log.info, log.warning, log.error):
                say("seen", value=value)
        finally:
            logger.removeHandler(other)
    lines = [re.sub(TIME, "", line) for line in stderr.getvalue().splitlines()]
    assert lines[:3] == lines[3:]
    assert len(set(lines)) == 3


def test_line_that_cannot_be_written_fails_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with logging_as("text") as stderr:
        stderr.close()
        log.info("seen")


def written(stderr: io.StringIO) -> list[str]:
    """The actions, or the libraries, of the lines so far."""
    return [line.split()[2] for line in stderr.getvalue().splitlines() if line[0] != " "]  # else of a traceback


async def test_lines_of_one_turn_of_the_event_loop_are_written_together_at_its_end() -> None:
    with logging_as("text") as stderr:
        log.info("one")
        log.info("two")
        assert written(stderr) == []
        await asyncio.sleep(0)
        assert written(stderr) == ["one", "two"]
        log.info("three")
        await asyncio.sleep(0)
        assert written(stderr) == ["one", "two", "three"]


async def test_no_line_overtakes_another() -> None:
    with logging_as("text") as stderr:
        log.info("one")
        log.warning("two")
        assert written(stderr) == ["one", "two"]
        log.info("three")
        logging.getLogger("library").warning("four")
        assert written(stderr) == ["one", "two", "three", "library"]
        log.info("five")
        await asyncio.to_thread(log.info, "six")
        assert written(stderr)[4:] == ["five", "six"]
        log.info("seven")
        try:
            raise ValueError("eight")
        except ValueError as error:
            log.error("eight", exc_info=error)
        assert [word for word in written(stderr) if word in ("seven", "eight")] == ["seven", "eight"]


async def test_lines_are_written_while_one_turn_writes_many_and_when_logging_ends() -> None:
    with logging_as("text") as stderr:
        for _ in range(10 * log.MAX_HELD):
            log.info("many")
        assert len(written(stderr)) >= 9 * log.MAX_HELD
        log.info("last")
        logging.getLogger().handlers[0].flush()  # as logging does when the process ends
        assert written(stderr)[-1] == "last"
        assert len(written(stderr)) == 10 * log.MAX_HELD + 1


def test_lines_of_a_loop_that_was_stopped_are_written_with_the_next() -> None:
    async def say() -> None:
        asyncio.get_running_loop().stop()
        log.info("one")

    with logging_as("text") as stderr:
        loop = asyncio.new_event_loop()
        with contextlib.suppress(RuntimeError):
            loop.run_until_complete(say())
        loop.close()
        log.info("two")
    assert written(stderr) == ["one", "two"]
