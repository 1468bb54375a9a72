"""How often one value may be checked: schemas whose recursion multiplies are refused when they are loaded.

`anyOf: [{properties: {a: {$ref: "#"}}}, {properties: {a: {$ref: "#"}}}]` checks a value at depth `d` 2^d times: 741
bytes to /validate stopped everything. A tree (`children: {items: {$ref: "#"}}`) recurses, too, but checks each value
once, and is accepted.

The measure: along the worst path through a payload of MAX_DEPTH levels, how many times is a schema applied to a value?
It is an upper bound, since every branch is assumed to be followed to its end.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from flowbridge.events import canonical_json
from flowbridge.events.schema_lint import SchemaError

MAX_CHECKS = 50_000  # along one path: a tenth of a second of the slower engine
RECHECKS = 3  # `unevaluated…` applies the keywords beside it again, to learn what they have evaluated

_IN_PLACE_LISTS = ("allOf", "anyOf", "oneOf")
_IN_PLACE = ("not", "if", "then", "else")
_UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
_LITERAL = re.compile(r"\^([A-Za-z0-9_/:@#-]*)")

_Id = int  # of a schema object
_Step = tuple[str, Any]  # a kind of child: ("name", "children"), ("pattern", "^x-"), ("index", 0), _OTHER or _REST

_OTHER: _Step = ("other", None)  # a property that no schema names
_REST: _Step = ("rest", None)  # an item behind those of every `prefixItems`


class Recursion:
    """Measures the documents of a catalogue, which refer to one another."""

    def __init__(self, documents: Mapping[str, Any], base_uri: str) -> None:
        self._documents = documents
        self._base_uri = base_uri
        self._pointers = {
            id(part): f"{name}.json: {at}".rstrip() for name in documents for part, at in _parts(documents[name], "")
        }
        resources = ((f"{base_uri}{name}.json", DRAFT202012.create_resource(doc)) for name, doc in documents.items())
        self._registry: Registry[Any] = Registry().with_resources(resources).crawl()

    def lint(self, name: str) -> None:
        """Raises SchemaError, with file and pointer, when a payload can make a schema check it too often."""
        document = self._documents[name]
        if not isinstance(document, dict):
            return
        graph = _Graph(self._pointers, _dynamic_anchors(document) or _anchors_of_all(self._documents))
        graph.visit(document, self._registry.resolver(f"{self._base_uri}{name}.json"))
        graph.measure()


class _Graph:
    """The schemas that a document leads to: which of them apply to the same value, and which to its children."""

    def __init__(self, pointers: Mapping[_Id, str], anchors: Mapping[str, list[dict[str, Any]]]) -> None:
        self._pointers = pointers
        self._anchors = anchors
        self._schemas: dict[_Id, dict[str, Any]] = {}
        self._same: dict[_Id, Counter[_Id]] = {}
        self._closures: dict[_Id, Counter[_Id]] = {}

    def visit(self, schema: Any, resolver: Any) -> None:
        if not isinstance(schema, dict) or id(schema) in self._schemas:
            return
        self._schemas[id(schema)] = schema
        same = self._same[id(schema)] = Counter()
        resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        times = RECHECKS if any(keyword in schema for keyword in _UNEVALUATED) else 1
        for part in _in_place(schema):
            same[id(part)] += times
            self.visit(part, resolver)
        for keyword in ("$ref", "$dynamicRef"):
            for part, theirs in self._targets(schema, keyword, resolver):
                same[id(part)] += times
                self.visit(part, theirs)
        for part in _of_children(schema):
            self.visit(part, resolver)

    def measure(self) -> None:
        """Raises SchemaError when it is too much. Each round goes a level deeper, until nothing changes."""
        moves = {key: list(self._moves(key)) for key in self._schemas}
        checks = dict.fromkeys(self._schemas, 0)
        for _ in range(canonical_json.MAX_DEPTH):
            before = checks
            checks = {
                key: min(
                    self._closures[key].total() + max((_sum(move, before) for move in moves[key]), default=0),
                    MAX_CHECKS,
                )
                for key in self._schemas
            }
            if checks == before:
                break
        guilty = [
            key for key in self._schemas if checks[key] >= MAX_CHECKS and self._multiplies(key, moves[key], checks)
        ]
        if guilty:  # the one that applies the fewest schemas: others lead to it
            key = min(guilty, key=lambda key: self._closures[key].total())
            raise SchemaError(f"{self._pointers[key]} {_WHY}")

    def _multiplies(self, key: _Id, moves: list[Counter[_Id]], checks: Mapping[_Id, int]) -> bool:
        """Whether one path becomes several here; otherwise the schemas below are to blame."""
        if self._closures[key].total() >= MAX_CHECKS:
            return True
        return any(sum(times for child, times in move.items() if checks[child] >= MAX_CHECKS) > 1 for move in moves)

    def _moves(self, key: _Id) -> Iterator[Counter[_Id]]:
        """For each kind of child of a value, the schemas that are applied to it, and how often."""
        closure = self._closure(key, [])
        steps = {step for found in closure for step in _steps(self._schemas[found])} | {_OTHER, _REST}
        for step in steps:
            move: Counter[_Id] = Counter()
            for found, times in closure.items():
                for child in _applied(self._schemas[found], step):
                    move[id(child)] += times
            if move:
                yield move

    def _closure(self, key: _Id, trail: list[_Id]) -> "Counter[_Id]":
        """The schemas applied to a value when this one is, and how often. Raises SchemaError for an endless circle."""
        if key in self._closures:
            return self._closures[key]
        if key in trail:
            raise SchemaError(f"{self._pointers[key]} leads in a circle: it would be applied to one value for ever")
        found = Counter({key: 1})
        for other, times in self._same[key].items():
            for further, more in self._closure(other, [*trail, key]).items():
                found[further] = min(found[further] + times * more, MAX_CHECKS)
        self._closures[key] = found
        return found

    def _targets(self, schema: Mapping[str, Any], keyword: str, resolver: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        reference = schema.get(keyword)
        if not isinstance(reference, str):
            return
        try:
            found = resolver.lookup(reference)
        except (Unresolvable, ValueError):
            at = self._pointers[id(schema)]
            raise SchemaError(f"{at} {keyword} {json.dumps(reference)} leads to no schema") from None
        target = found.contents
        if not isinstance(target, dict):
            return
        anchor = reference.rpartition("#")[2]
        if keyword == "$dynamicRef" and target.get("$dynamicAnchor") == anchor:
            # Which one it is depends on the path; one in the checked document is always the outermost.
            yield from ((other, found.resolver) for other in self._anchors.get(anchor, [target]))
        else:
            yield target, found.resolver


_WHY = (
    "checks the same value in several branches again and again: of a payload of "
    f"{canonical_json.MAX_DEPTH} levels more than {MAX_CHECKS} times; let one branch, or none, lead further down"
)


def _sum(move: Mapping[_Id, int], checks: Mapping[_Id, int]) -> int:
    return sum(times * checks[child] for child, times in move.items())


def _in_place(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The subschemas that apply to the same value; booleans cost nothing."""
    found = [schema.get(keyword) for keyword in _IN_PLACE]
    for keyword in _IN_PLACE_LISTS:
        found += value if isinstance(value := schema.get(keyword), list) else []
    if isinstance(dependent := schema.get("dependentSchemas"), dict):
        found += dependent.values()
    yield from (part for part in found if isinstance(part, dict))


def _of_children(schema: Mapping[str, Any]) -> Iterator[Any]:
    for step in {*_steps(schema), _OTHER, _REST}:
        yield from _applied(schema, step)


def _steps(schema: Mapping[str, Any]) -> Iterator[_Step]:
    """The kinds of children that a schema distinguishes."""
    yield from (("name", name) for name in _dict(schema, "properties"))
    yield from (("pattern", pattern) for pattern in _dict(schema, "patternProperties"))
    yield from (("index", index) for index in range(len(_list(schema, "prefixItems"))))


def _applied(schema: Mapping[str, Any], step: _Step) -> list[dict[str, Any]]:
    """The subschemas that apply to a child of this kind."""
    kind, value = step
    if kind in ("index", "rest"):
        prefix = _list(schema, "prefixItems")
        is_prefix = kind == "index" and value < len(prefix)
        found = [prefix[value] if is_prefix else schema.get("items", schema.get("unevaluatedItems"))]
        found.append(schema.get("contains"))
    else:
        patterns = _dict(schema, "patternProperties")
        found = [part for pattern, part in patterns.items() if _may_match(pattern, step)]
        if kind == "name" and value in (named := _dict(schema, "properties")):
            found.append(named[value])
        if not found:
            found = [schema.get("additionalProperties", schema.get("unevaluatedProperties"))]
    return [part for part in found if isinstance(part, dict)]


def _may_match(pattern: str, step: _Step) -> bool:
    """Whether a name of this kind may match a pattern; two patterns are distinguished by how they begin."""
    kind, value = step
    if kind == "name":
        try:
            return re.search(pattern, value) is not None
        except re.error:
            return True
    if kind != "pattern":
        return False
    ours, theirs = _LITERAL.match(pattern), _LITERAL.match(value)
    if pattern == value or ours is None or theirs is None:
        return True
    return ours[1].startswith(theirs[1]) or theirs[1].startswith(ours[1])


def _dict(schema: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _parts(value: Any, at: str) -> Iterator[tuple[Any, str]]:
    """All objects inside a document, with their pointers."""
    if isinstance(value, dict):
        yield value, at
        for key, item in value.items():
            yield from _parts(item, canonical_json.pointer(at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _parts(item, canonical_json.pointer(at, index))


def _dynamic_anchors(document: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for part, _ in _parts(document, ""):
        if isinstance(anchor := part.get("$dynamicAnchor"), str):
            found.setdefault(anchor, []).append(part)
    return found


def _anchors_of_all(documents: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for document in documents.values():
        for anchor, parts in _dynamic_anchors(document).items():
            found.setdefault(anchor, []).extend(parts)
    return found
