"""The render process: reads requests from a socket, one at a time, and answers each, until the socket ends.

The kernel ends it when a request takes too much of the processor or, as far as the libraries cannot bear it, of the
memory. On a busy machine a second may be long, so the time is the processor's. It has no secrets: neither the bridge's
environment, nor its files.

A request and its answer are JSON behind their length in 4 bytes. In: [format, source, users]. Out: ["", body, html
or null], or [what is wrong]. The formats "webhook" and "template" have what `webhooks` and `template_check` are given
for users, and their answers for the body.
"""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from io import BufferedIOBase
from typing import Any

Render = Callable[[str, Any], tuple[str, str | None]]

CPU_SECONDS = 1.0  # for one request: the worst of 32 KiB takes 0.04
MEMORY_BYTES = 512 * 1024 * 1024
MAX_OUTPUT = 128 * 1024  # bytes; an event holds half of that
MAX_HOOK_OUTPUT = 384 * 1024  # of all messages that a webhook becomes, beyond what was in its body
NO_MEMORY = 3  # the exit status, where there is none for an answer
NICE = 5  # the event loop goes first


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

    stream = socket.socket(fileno=0).makefile("rwb")
    renders: Mapping[str, Render] = {
        "markdown": formats.markdown,
        "html": formats.html,
        "webhook": webhooks.webhook,
        "template": template_check.check,
    }
    for request in iter(partial(_read, stream), b""):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, for which there is no handler, ends the process
        try:
            answer = _answer(request, renders)
        except MemoryError:
            answer = b'["needs too much memory"]'
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        stream.write(len(answer).to_bytes(4, "big") + answer)
        stream.flush()


def _answer(request: bytes, renders: Mapping[str, Render]) -> bytes:
    format_, source, users = json.loads(request)
    answer: tuple[str, ...] | tuple[str, str, str | None]
    try:
        body, html = renders[format_](source, users)
        answer = ("", body, html)
        # Files and ids in a webhook's body come back with its texts, which are bounded.
        if len(body) + len(html or "") > (MAX_HOOK_OUTPUT + len(source) if format_ == "webhook" else MAX_OUTPUT):
            answer = ("becomes too long",)
    except ValueError as error:  # RefusedError, TooDeepError
        answer = (str(error),)
    except RecursionError:
        answer = ("is nested too deeply",)
    return json.dumps(answer).encode()


def _read(stream: BufferedIOBase) -> bytes:
    """The next request; nothing at the end."""
    head = stream.read(4)
    try:
        return stream.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    except MemoryError:
        os._exit(NO_MEMORY)
