"""JSON as Matrix defines it: read strictly, written canonically.

Matrix events hold no floats and no integers beyond ±(2^53-1), have unique keys and are UTF-8 (Matrix specification,
appendix "Canonical JSON"). Python's own reader accepts all of these, and fails on deep nesting.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from json.encoder import encode_basestring
from typing import Any, NoReturn

from flowbridge.errors import BadContent, NotJson, Problem

MAX_DEPTH = 64
MAX_INTEGER = 2**53 - 1
MAX_REPORTED = 100
RULE = "json"  # what Problem.schema says for these rules

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Document:
    """A body that was read. When it is not `clean`, some value in it may break a rule: `problems()` says which."""

    value: Any
    clean: bool


def read(raw: bytes) -> Document:
    """Read a JSON text. Raises NotJson with the position, or BadContent when it is nested too deeply."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotJson(f"the body is not UTF-8: byte {error.start} is wrong") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_too_deep(text):
        raise BadContent([Problem("", f"is nested more than {MAX_DEPTH} levels deep", RULE)])
    try:
        try:
            value = _decode(text)
        except _BreaksRuleError:
            return Document(_MARKING.decode(text), clean=False)
    except json.JSONDecodeError as error:
        what, hint = error.msg.removesuffix(" at"), ""
        if what == "Invalid control character" and error.doc[error.pos] in "\r\n":
            what, hint = "a line break inside a string", r" (write it as \n)"
        raise NotJson(f"the body is not JSON: {what} at line {error.lineno} column {error.colno}{hint}") from None
    return Document(value, clean="\\ud" not in text and "\\uD" not in text)


def write(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8."""
    return "".join(_PIECES(value, 0)).encode() if _PIECES is not None else _CANONICAL.encode(value).encode()


def problems(value: Any) -> list[Problem]:
    """The values in a marked tree that break a rule, in document order (the first 100)."""
    return list(islice(_walk(value, ""), MAX_REPORTED))


def duplicates(value: Any) -> list[Problem]:
    """The keys that this object itself names twice; its values are not checked."""
    return [_duplicate("", key) for key in getattr(value, "repeated", ())]


def pointer(parent: str, key: str | int) -> str:
    """An RFC 6901 pointer: `parent` extended by one escaped step."""
    step = str(key).replace("~", "~0").replace("/", "~1").encode("utf-8", "replace").decode()
    return f"{parent}/{step}"


class _BreaksRuleError(Exception):
    """The strict reader met a value whose position only the marking reader can tell."""


@dataclass(frozen=True, slots=True)
class _Marked:
    """Stands in a tree for a value that breaks a rule."""

    message: str


class _Repeating(dict[str, Any]):
    """An object that names some keys twice (the last one counts, as in every reader)."""

    repeated: tuple[str, ...] = ()


def _decode(text: str) -> Any:
    """As `_STRICT.decode`, without its two searches for white space, which hardly any body has around it."""
    if text[:1] == "{":
        try:
            value, end = _SCAN(text, 0)
        except StopIteration:  # a value is missing: `decode` says where
            pass
        else:
            if end == len(text):
                return value
    return _STRICT.decode(text)


def _is_too_deep(text: str) -> bool:
    depth = 0
    for character in _STRING.sub("", text):
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif character in "]}":
            depth -= 1
    return False


def _walk(value: Any, at: str) -> Iterator[Problem]:
    if isinstance(value, _Marked):
        yield Problem(at, value.message, RULE)
    elif isinstance(value, str) and not is_unicode(value):
        yield Problem(at, "holds a lone surrogate, which is not Unicode text", RULE)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, pointer(at, index))
    elif isinstance(value, dict):
        for key in getattr(value, "repeated", ()):
            yield _duplicate(at, key)
        for key, item in value.items():
            if not is_unicode(key):
                yield Problem(pointer(at, key), "has a lone surrogate in its name", RULE)
            yield from _walk(item, pointer(at, key))


def _duplicate(at: str, key: str) -> Problem:
    return Problem(pointer(at, key), "is there twice", RULE)


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(_: str) -> NoReturn:
    raise _BreaksRuleError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _BreaksRuleError
    return value


def _integer(digits: str) -> int:
    if len(digits) > 17 or not -MAX_INTEGER <= (number := int(digits)) <= MAX_INTEGER:
        raise _BreaksRuleError
    return number


def _mark_float(number: str) -> _Marked:
    return _Marked(f"{number[:40]} is not an integer: Matrix events hold no fractions or exponents")


def _mark_integer(digits: str) -> int | _Marked:
    try:
        return _integer(digits)
    except _BreaksRuleError:
        return _Marked(f"{digits[:40]} is beyond ±(2^53-1)")


def _mark_constant(name: str) -> _Marked:
    return _Marked(f"{name} is not a JSON value")


def _mark_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = _Repeating(pairs)
    if len(value) == len(pairs):
        return dict(pairs)
    seen: set[str] = set()
    value.repeated = tuple(dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_refuse, parse_int=_integer, parse_constant=_refuse)
_SCAN: Callable[[str, int], tuple[Any, int]] = vars(_STRICT)["scan_once"]
_MARKING = json.JSONDecoder(
    object_pairs_hook=_mark_repeated,
    parse_float=_mark_float,
    parse_int=_mark_integer,
    parse_constant=_mark_constant,
)
_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
# What `_CANONICAL` makes for each value, which is half of its time: made once, of the same options. Without
# the search for circles: a value that was read has none.
_MAKE = getattr(json.encoder, "c_make_encoder", None)
_PIECES: Callable[[Any, int], tuple[str, ...]] | None = _MAKE and _MAKE(
    None, _CANONICAL.default, encode_basestring, None, ":", ",", True, False, False
)
