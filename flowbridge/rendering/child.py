"""The render process: reads texts from a socket, renders one after another, and answers, until the socket ends.

The kernel ends it when texts take too much of the processor or, as far as the libraries cannot bear it, of the memory.
On a busy machine a second may be long, so the time is the processor's. It has no secrets: neither the bridge's
environment, nor its files.

Several texts come at once: each system call, and each change from one process to the other, would cost as much as a
short text. What goes either way stands behind its length in 4 bytes. In: texts as `framed` has them, since a body in
JSON would be quoted and read once more. Out, as JSON, in the same order and in as many parts as it takes: [["", body,
html or null], or [what is wrong], …]. The formats "webhook" and "template" have what `webhooks` and `template_check`
are given for users. The answer of the one stands for body and HTML, as it is: ["", {…}]; that of the other for the
body.
"""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BufferedRWPair
from typing import Any, cast

Text = tuple[str, str, Any]  # its format, the text itself, the users whose names in it become links
Render = Callable[[str, Any], tuple[str, str | None]]

CPU_SECONDS = 1.0  # for the texts of one request: the worst 32 KiB take 0.04
ANSWER_SECONDS = 0.002  # after which the texts that are done do not wait for the others …
ANSWER_LENGTH = 1_000  # … nor for one that is longer than this, and may take as long; a webhook's takes 0.2 ms
MEMORY_BYTES = 512 * 1024 * 1024
MAX_OUTPUT = 128 * 1024  # characters; an event holds half of that
MAX_HOOK_OUTPUT = 384 * 1024  # of all messages that a webhook becomes, beyond what was in its body
MAX_ANSWERS = 64 * 1024 * 1024  # bytes of one part: a webhook of 25 MiB may hold files that come back
NO_MEMORY = 3  # the exit status, where there is none for an answer
NICE = 5  # the event loop goes first
BUFFER_BYTES = 64 * 1024


def framed(format_: str, source: str, users: Any) -> bytes:
    """A text as it goes to the process."""
    head, text = json.dumps([format_, users]).encode(), source.encode("utf-8", "surrogatepass")
    return b"%b%b%b%b" % (len(head).to_bytes(4, "big"), head, len(text).to_bytes(4, "big"), text)


def serve() -> None:
    """On the socket that is the standard input."""
    import resource  # not on every system, and this module is read by the bridge, too

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    with contextlib.suppress(OSError, ValueError):  # not everywhere
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with contextlib.suppress(OSError):
        os.nice(NICE)
    from flowbridge.rendering import formats, template_check, webhooks

    stream = cast("BufferedRWPair", socket.socket(fileno=0).makefile("rwb", BUFFER_BYTES))
    renders: Mapping[str, Render] = {
        "markdown": formats.markdown,
        "html": formats.html,
        "webhook": webhooks.webhook,
        "template": template_check.check,
    }
    for texts in iter(partial(_read, stream), []):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, for which there is no handler, ends the process
        answers, began = list[bytes](), time.monotonic()
        for text in texts:
            is_long = len(text[1]) > ANSWER_LENGTH and text[0] != "webhook"
            if answers and (is_long or time.monotonic() - began > ANSWER_SECONDS):
                _write(stream, answers)
                answers, began = [], time.monotonic()
            answers.append(_answer(text, renders))
        _write(stream, answers)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _answer(text: Text, renders: Mapping[str, Render]) -> bytes:
    format_, source, users = text
    try:
        body, html = renders[format_](source, users)
        # Files and ids in a webhook's body come back with its texts, which are bounded.
        if len(body) + len(html or "") <= (MAX_HOOK_OUTPUT + len(source) if format_ == "webhook" else MAX_OUTPUT):
            if format_ == "webhook":  # JSON already
                answer = b'["",%b]' % body.encode("utf-8", "surrogatepass")
            else:
                answer = json.dumps(("", body, html)).encode()
            if len(answer) < MAX_ANSWERS:
                return answer
        wrong = "becomes too long"
    except ValueError as error:  # RefusedError, TooDeepError
        wrong = str(error)
    except RecursionError:
        wrong = "is nested too deeply"
    except MemoryError:
        wrong = "needs too much memory"
    return json.dumps((wrong,)).encode()


def _read(stream: BufferedRWPair) -> list[Text]:
    """The texts of the next request; none at the end."""
    head = stream.read(4)
    try:
        return list(_texts(stream.read(int.from_bytes(head, "big")))) if len(head) == 4 else []
    except MemoryError:
        os._exit(NO_MEMORY)


def _texts(request: bytes) -> Iterator[Text]:
    at = 0
    while at < len(request):
        head, at = _piece(request, at)
        text, at = _piece(request, at)
        format_, users = json.loads(head)
        yield format_, text.decode("utf-8", "surrogatepass"), users


def _piece(request: bytes, at: int) -> tuple[bytes, int]:
    end = at + 4 + int.from_bytes(request[at : at + 4], "big")
    return request[at + 4 : end], end


def _write(stream: BufferedRWPair, answers: Sequence[bytes]) -> None:
    found = b"[%b]" % b",".join(answers)
    stream.write(len(found).to_bytes(4, "big") + found)
    stream.flush()
