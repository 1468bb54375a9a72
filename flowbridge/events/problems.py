"""Explains what is wrong with a content, each problem with a JSON Pointer. The authority is jsonschema."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import jsonschema_rs
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from flowbridge.errors import Problem
from flowbridge.events import canonical_json

SECONDS = 0.25  # of processor time: a caller with thousands of mistakes hears of those that were found by then
MAX_STEPS = 20_000  # keywords applied: a tenth of a second. One mistake may take many, since every branch is tried
CLOCK_STEPS = 64  # between two checks of the clock

Errors = Iterator[ValidationError]
Keyword = Callable[[Any, Any, Any, Any], "Errors | None"]

_TYPES = {
    "array": "an array",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}


class Explainer:
    """The slow half of one catalogue entry, made when the first wrong payload arrives.

    `fast`: the validator whose verdict is explained. `max_steps`: the budget of one payload.
    """

    def __init__(
        self,
        name: str,
        schema: Mapping[str, Any],
        fast: jsonschema_rs.Validator,
        base_uri: str,
        documents: Mapping[str, Any],
        *,
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.name = name
        self._fast = fast
        self._max_steps = max_steps
        resources = [
            (f"{base_uri}{key}.json", DRAFT202012.create_resource(_undeclared(value)))
            for key, value in documents.items()
        ]
        registry: Registry[Any] = Registry().with_resources(resources)  # retrieves nothing by itself
        self._validator = _Validator({"$id": f"{base_uri}{name}.json", **_undeclared(schema)}, registry=registry)

    def is_valid(self, content: Any) -> bool:
        """jsonschema's own verdict, without a budget."""
        _budget.begin(sys.maxsize, math.inf)
        return bool(self._validator.is_valid(content))

    def problems(self, content: Any) -> list[Problem]:
        """All problems by pointer: at most 100, and no search beyond `max_steps` or a quarter of a second."""
        _budget.begin(self._max_steps, SECONDS)
        found: dict[tuple[str, str], Problem] = {}
        try:
            for error in self._validator.iter_errors(content):
                problem = self._problem(list(error.absolute_path), _words(error))
                found.setdefault((problem.pointer, problem.message), problem)
                if len(found) == canonical_json.MAX_REPORTED:
                    break
        except _Exhausted:
            if not found:
                return [self._problem([], "is not valid; it is too large, or nested too deeply, to say where")]
        return sorted(found.values(), key=lambda problem: problem.pointer) or self._fast_problems(content)

    def _fast_problems(self, content: Any) -> list[Problem]:
        """The engines disagree: refuse all the same, in the words of the fast one."""
        errors = islice(self._fast.iter_errors(content), canonical_json.MAX_REPORTED)
        return [self._problem(list(error.instance_path), error.message[:200]) for error in errors]

    def _problem(self, path: list[str | int], message: str) -> Problem:
        at = ""
        for step in path:
            at = canonical_json.pointer(at, step)
        return Problem(at, message, self.name)


class _Exhausted(Exception):
    """The budget of one payload is spent."""


class _Budget(threading.local):
    """What the explanation of one payload may still cost; each thread explains one at a time."""

    steps = sys.maxsize
    ends = math.inf

    def begin(self, steps: int, seconds: float) -> None:
        self.steps = steps
        self.ends = time.thread_time() + seconds

    def spend(self) -> None:
        """Called for each keyword applied. Raises _Exhausted, also in the middle of one error."""
        self.steps -= 1
        if self.steps < 0 or (self.steps % CLOCK_STEPS == 0 and time.thread_time() > self.ends):
            raise _Exhausted


_budget = _Budget()


def _counted(keyword: Keyword) -> Keyword:
    """The keyword, at a cost. It is lazy, as jsonschema's own are: an error that is not asked for costs nothing."""

    def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        _budget.spend()
        yield from keyword(validator, value, instance, schema) or ()

    return apply


def _undeclared(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Without `$schema`: where a `$ref` leads to one, jsonschema falls back to its own class, without our keywords."""
    return {key: value for key, value in schema.items() if key != "$schema"}


def _words(error: ValidationError) -> str:
    wanted: Any = error.validator_value
    match error.validator:
        case "type":
            types = [wanted] if isinstance(wanted, str) else wanted
            return f"must be {' or '.join(_TYPES[name] for name in types)}, not {_kind_of(error.instance)}"
        case "enum":
            return f"must be one of {', '.join(_quote(value) for value in wanted)}, not {_quote(error.instance)}"
        case "const":
            return f"must be {_quote(wanted)}, not {_quote(error.instance)}"
        case "pattern":
            title = error.schema.get("title") if isinstance(error.schema, dict) else None
            return f"{_quote(error.instance)} is not {title or f'of the form {wanted}'}"
        case "minimum":
            return f"must be at least {wanted}, not {_quote(error.instance)}"
        case "maximum":
            return f"must be at most {wanted}, not {_quote(error.instance)}"
        case "minLength" | "minItems" | "minProperties":
            return "must not be empty" if wanted == 1 else f"must have at least {wanted} elements"
        case _:
            return error.message[:200]


def _kind_of(value: Any) -> str:
    names = {int: "integer", str: "string", list: "array", dict: "object", type(None): "null"}
    return json.dumps(value) if isinstance(value, bool) else _TYPES.get(names.get(type(value), ""), "")


def _quote(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _required(validator: Any, names: list[str], instance: Any, schema: Any) -> Errors:
    """As jsonschema's own, but points at the key that is missing."""
    if isinstance(instance, dict):
        for name in names:
            if name not in instance:
                yield ValidationError("is required", path=[name])


def _dependent_required(validator: Any, dependents: Mapping[str, list[str]], instance: Any, schema: Any) -> Errors:
    if isinstance(instance, dict):
        for name, needs in dependents.items():
            for need in needs:
                if name in instance and need not in instance:
                    yield ValidationError(f"is required, because {name} is there", path=[need])


def _any_of(validator: Any, branches: list[Any], instance: Any, schema: Any) -> Errors:
    """Report a choice between required keys as one problem, any other choice by the closest branch."""
    attempts = [list(validator.descend(instance, branch, schema_path=i)) for i, branch in enumerate(branches)]
    if not all(attempts):
        return
    if all(set(branch) == {"required"} for branch in branches):
        names = [name for branch in branches for name in branch["required"]]
        yield ValidationError(f"is required (one of {' or '.join(names)})", path=[names[0]])
        return
    yield from max(attempts, key=_closeness)


def _closeness(errors: list[ValidationError]) -> tuple[int, int]:
    """The deeper a branch's errors lie in the content, the nearer it was to what the caller meant."""
    return min(len(error.relative_path) for error in errors), -len(errors)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Errors:
    """In the fast engine's dialect: Python's `$` also matches before a final newline, and its engine backtracks."""
    if isinstance(instance, str) and not _compiled(pattern).is_valid(instance):
        yield ValidationError(f"does not match {pattern!r}")


def _max_bytes(validator: Any, limit: int, instance: Any, schema: Any) -> Errors:
    if isinstance(instance, str) and (size := len(instance.encode())) > limit:
        yield ValidationError(f"is {size} bytes of UTF-8, more than {limit}")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator({"pattern": pattern}, pattern_options=jsonschema_rs.RegexOptions())


_KEYWORDS: dict[str, Keyword] = {
    **Draft202012Validator.VALIDATORS,
    "required": _required,
    "dependentRequired": _dependent_required,
    "anyOf": _any_of,
    "pattern": _pattern,
    "x-max-bytes": _max_bytes,
}
_Validator = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {name: _counted(keyword) for name, keyword in _KEYWORDS.items()}
)
