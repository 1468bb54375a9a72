"""Schema files in, a frozen registry out.

A schema describes an event's content. Annotations at its top say what the event is: `x-kind` ("message" or
"state"), `x-state-key` (a schema for the state key) and `x-empty` (whether `{}` clears this state). One keyword is
ours: `x-max-bytes`, the longest UTF-8 form of a string.

Some rules hold for the content of every event, whether its type has a schema or not. Homeservers read some keys in
events of all types, and Synapse 1.163 always answers 500 to some of their values, to
`{"m.mentions": {"user_ids": [null]}}` for one: such an event would hold up everything behind it in its room. The values
were found by sending the examples of the catalogue, mutated, to a real Synapse (tests/integration/test_poison.py).
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import jsonschema_rs

from flowbridge.errors import BadRequest, MatrixError, Problem
from flowbridge.events import canonical_json
from flowbridge.events.schema_lint import SchemaError, lint, lint_references
from flowbridge.models import Kind

BASE_URI = "https://flowbridge.invalid/schemas/"
COMPONENTS = "components/"
GENERAL: Final[Mapping[str, Any]] = {"$ref": "components/event.json"}  # for events of every type
GENERAL_KEYS: Final = ("m.mentions", "m.relates_to", "org.matrix.labels", "redacts")  # the properties of that schema
# Types that a client has no reason to send, and that therefore have no schema in the catalogue.
UNLISTED: Final[Mapping[str, Mapping[str, Any]]] = {
    "m.room.aliases": {"properties": {"aliases": {"type": "array", "items": {"type": "string"}}}},
    "m.room.create": {"properties": {"type": {"type": "string"}}},
}
KEPT: Final = ("m.room.redaction",)  # whose own schema holds even when a folder of the user's replaces it

if TYPE_CHECKING:
    from flowbridge.events.problems import Explainer

_PACKAGE = Path(__file__).parent.parent
_GENERAL_KEYS: Final = frozenset(GENERAL_KEYS)


def built_in() -> Path:
    """The folder of the schemas: inside the package in a wheel, beside it in a checkout."""
    packaged = _PACKAGE / "schemas"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "schemas"


class MaxBytes:
    """`x-max-bytes` as jsonschema-rs wants a keyword."""

    def __init__(self, parent_schema: dict[str, Any], value: Any, schema_path: list[str | int]) -> None:
        self.limit = value

    def validate(self, instance: Any) -> None:
        if isinstance(instance, str) and len(instance.encode()) > self.limit:
            raise ValueError(f"is more than {self.limit} bytes of UTF-8")


@dataclass(frozen=True, eq=False)
class Entry:
    """One schema: of an event type, or of one msgtype of m.room.message (`name` is then `type$msgtype`)."""

    name: str
    kind: Kind
    schema: dict[str, Any]
    documents: Mapping[str, Any]
    registry: jsonschema_rs.Registry

    @cached_property
    def validator(self) -> jsonschema_rs.Validator:
        # For the first event: all take 30 ms, and a bridge sends a few types.
        return _compile(self.schema, self.registry)

    @cached_property
    def state_key_validator(self) -> jsonschema_rs.Validator:
        return _compile(self.schema.get("x-state-key", True), self.registry)

    @cached_property
    def required(self) -> frozenset[str]:
        return frozenset(_required(self.schema, self.documents))

    def compile(self) -> None:
        """Both now. Raises SchemaError."""
        try:
            _ = self.validator, self.state_key_validator
        except ValueError as error:
            raise SchemaError(f"{self.name}.json: {str(error).splitlines()[0]}") from None

    @property
    def event_type(self) -> str:
        return self.name.partition("$")[0]

    @property
    def clears_by_empty(self) -> bool:
        """Whether `PUT …/state/` accepts `{}`, as clients remove an avatar, a space child, an invitation."""
        return self.kind == "state" and self.schema.get("x-empty", True)

    def problems(self, content: Any) -> list[Problem]:
        """All problems of this content, by pointer; none when it is valid."""
        if self.validator.is_valid(content):
            return []
        return self.explainer.problems(content)

    def state_key_problem(self, state_key: str) -> Problem | None:
        if self.state_key_validator.is_valid(state_key):
            return None
        wanted = self.schema["x-state-key"]
        expected = json.dumps(wanted["const"]) if "const" in wanted else wanted.get("title", "another one")
        return Problem("/state_key", f"must be {expected} for {self.event_type}", self.name)

    @cached_property
    def explainer(self) -> "Explainer":
        # jsonschema takes long to import: only a caller with a wrong payload waits for it, once.
        from flowbridge.events.problems import Explainer

        return Explainer(self.name, self.schema, self.validator, BASE_URI, self.documents)


# Of the specification, or in wide use, without a schema here: they may be sent.
OTHER_TYPES = frozenset(
    {
        "m.beacon",
        "m.beacon_info",
        "m.call.asserted_identity",
        "m.call.member",
        "m.call.notify",
        "m.call.replaces",
        "m.key.verification.accept",
        "m.key.verification.cancel",
        "m.key.verification.done",
        "m.key.verification.key",
        "m.key.verification.mac",
        "m.key.verification.ready",
        "m.key.verification.request",
        "m.key.verification.start",
        "m.location",
        "m.poll.end",
        "m.poll.response",
        "m.poll.start",
        "m.room.add_state_level",
        "m.room.aliases",
        "m.room.bot.options",
        "m.room.bridging",
        "m.room.create",
        "m.room.ops_levels",
        "m.room.plumbing",
        "m.room.power_levels",
        "m.room.related_groups",
        "m.room.retention",
        "m.room.send_event_level",
        "m.rtc.member",
        "m.rtc.notification",
        "m.widget",
        "m.bridge",
    }
)


class Catalogue(Mapping[str, Entry]):
    """All entries by name. Immutable: read once at start.

    `general`: the rules for every type; `by_type`: those that a type keeps whatever a folder of the user's replaces.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        documents: Mapping[str, dict[str, Any]],
        folders: tuple[Path, ...],
        general: Entry,
        by_type: Mapping[str, Entry],
    ) -> None:
        self._general = general
        self._by_type = by_type
        self._entries = dict(sorted(entries.items()))
        self._documents = documents
        self._folders = folders

    @classmethod
    def load(cls, extra: Path | None = None) -> Self:
        """Read the built-in schemas and those of `extra`, which win by file name. Raises SchemaError."""
        folders = (built_in(), extra) if extra else (built_in(),)
        ours = _read(built_in())
        documents = {**ours, **_read(extra)} if extra else ours
        registry = _registry(documents)
        names = (name for name in documents if not name.startswith(COMPONENTS))
        entries = {name: _entry(name, documents, registry) for name in names}
        if extra:
            for entry in entries.values():
                entry.compile()
            _lint_recursion(documents)
        return cls(entries, documents, folders, *_general(ours, _registry(ours) if extra else registry))

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def select(self, event_type: str, content: Any) -> Entry | None:
        """The most specific schema: `m.image` inside `m.room.message`; an unknown msgtype gets the base."""
        if "$" in event_type:
            return None
        msgtype = content.get("msgtype") if isinstance(content, dict) else None
        if isinstance(msgtype, str) and (entry := self._entries.get(f"{event_type}${msgtype}")):
            return entry
        return self._entries.get(event_type)

    def general_problems(self, event_type: str, content: Mapping[str, Any]) -> list[Problem]:
        """What breaks the rules for all types, by pointer; empty for nearly all events, which hold none of the keys."""
        found: list[Problem] = []
        if not _GENERAL_KEYS.isdisjoint(content):
            found = self._general.problems({key: content[key] for key in GENERAL_KEYS if key in content})
        entry = self._by_type.get(event_type)
        return found if entry is None else [*found, *entry.problems(content)]

    def check_type(self, event_type: str) -> None:
        """Raises BadRequest for a type under `m.` that Matrix does not have: no client would show the event."""
        if not event_type.startswith("m.") or event_type in self._entries or event_type in OTHER_TYPES:
            return
        nearest = difflib.get_close_matches(event_type, {*self, *OTHER_TYPES}, 1, 0.6)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise BadRequest(
            f"Matrix has no event type {event_type[:255]}{hint}. A type of your own begins with your domain, "
            "as org.example.alert does",
        )

    def document(self, name: str) -> dict[str, Any] | None:
        """A schema as its file has it: of an event type, of a msgtype, or `components/…`."""
        return self._documents.get(name)

    @property
    def documents(self) -> Mapping[str, dict[str, Any]]:
        return self._documents

    def required(self, event_type: str) -> frozenset[str]:
        entry = self.select(event_type, None)
        return entry.required if entry else frozenset()

    def examples(self, name: str) -> list[dict[str, Any]]:
        """The valid example events beside the schemas, as their files have them."""
        found: dict[str, dict[str, Any]] = {}
        for folder in self._folders:
            for path in sorted((folder / "examples").glob("*.json")):
                if path.stem.partition("~")[0] == name:
                    found[path.stem] = json.loads(path.read_bytes())
        return list(found.values())


def _read(folder: Path) -> dict[str, Any]:
    """Every schema of a folder by its name: the file's path without `.json`."""
    if not folder.is_dir():
        raise SchemaError(f"{folder} is not a folder")
    paths = [*folder.glob("*.json"), *folder.glob(COMPONENTS + "*.json")]
    documents: dict[str, Any] = {}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix().removesuffix(".json")
        documents[name] = lint(path, _json(path), is_event=not name.startswith(COMPONENTS))
    return documents


def _json(path: Path) -> Any:
    try:
        document = canonical_json.read(path.read_bytes())
    except OSError as error:
        raise SchemaError(f"{path}: {error.strerror}") from None
    except MatrixError as error:
        raise SchemaError(f"{path}: {error.error}") from None
    if not document.clean and (found := canonical_json.problems(document.value)):
        raise SchemaError(f"{path}: {found[0].pointer} {found[0].message}")
    return document.value


def _entry(name: str, documents: Mapping[str, Any], registry: jsonschema_rs.Registry) -> Entry:
    schema = documents[name]
    return Entry(name, schema.get("x-kind"), schema, documents, registry)


def _general(ours: Mapping[str, Any], registry: jsonschema_rs.Registry) -> tuple[Entry, dict[str, Entry]]:
    documents = {**UNLISTED, **{name: ours[name] for name in KEPT}}
    by_type = {name: _entry(name, {**ours, name: schema}, registry) for name, schema in documents.items()}
    return _entry("event", {**ours, "event": GENERAL}, registry), by_type


def _registry(documents: Mapping[str, Any]) -> jsonschema_rs.Registry:
    """All documents by URI. lint_references ensures that they refer to nothing else."""
    for name in documents:
        lint_references(name, documents)
    try:
        return jsonschema_rs.Registry([(f"{BASE_URI}{name}.json", value) for name, value in documents.items()])
    except ValueError as error:
        raise SchemaError(f"the schemas do not fit together: {str(error).splitlines()[0]}") from None


def _lint_recursion(documents: Mapping[str, Any]) -> None:
    """A test does it for our own schemas: a start without others need not take the 0.2 s."""
    from flowbridge.events.recursion import Recursion

    recursion = Recursion(documents, BASE_URI)
    for name in documents:
        recursion.lint(name)


def _compile(schema: Any, registry: jsonschema_rs.Registry) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator(
        schema,
        registry=registry,
        base_uri=BASE_URI,
        keywords={"x-max-bytes": MaxBytes},
        pattern_options=jsonschema_rs.RegexOptions(),  # the linear engine: no payload can make it slow
        offline=True,
    )


def _required(schema: Any, documents: Mapping[str, Any]) -> Iterator[str]:
    """The keys that a content must have, those required by an `allOf` or a `$ref` to a file included."""
    if isinstance(schema, dict):
        yield from schema.get("required", ())
        for part in schema.get("allOf", ()):
            yield from _required(part, documents)
        yield from _required(documents.get(schema.get("$ref", "").removesuffix(".json")), documents)
