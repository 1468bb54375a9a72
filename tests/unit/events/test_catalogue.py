"""flowbridge.events: the schema files, how one is chosen, and how a mistake is put into words."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from flowbridge.errors import BadRequest
from flowbridge.events import Catalogue, Entry, SchemaError, built_in
from flowbridge.events.catalogue import BASE_URI
from flowbridge.events.problems import Explainer

CATALOGUE = Catalogue.load()
EXAMPLES = sorted((built_in() / "examples").glob("*.json"))
INVALID = sorted((built_in() / "examples" / "invalid").glob("*.json"))
SCHEMAS = sorted(built_in().glob("*.json"))
COMPONENTS = sorted((built_in() / "components").glob("*.json"))
TEXT = {"msgtype": "m.text", "body": "hi"}

# Every event that seed 000 prints, in its order.
SEED_000 = [
    ("m.room.message", "m.text"),
    ("m.room.message", "m.emote"),
    ("m.room.message", "m.notice"),
    ("m.room.message", "m.image"),
    ("m.room.message", "m.file"),
    ("m.room.message", "m.audio"),
    ("m.room.message", "m.location"),
    ("m.room.message", "m.video"),
    ("m.room.message", "m.server_notice"),
    ("m.room.message.feedback", None),
    ("m.room.name", None),
    ("m.room.topic", None),
    ("m.room.avatar", None),
    ("m.room.pinned_events", None),
]


def load(path: Path) -> Any:
    return json.loads(path.read_bytes())


def chosen(event_type: str, content: Any) -> Entry:
    entry = CATALOGUE.select(event_type, content)
    assert entry is not None
    return entry


def by_jsonschema(entry: Entry, content: Any) -> bool:
    """The verdict of the second engine alone: `Entry.problems` asks the first one, too."""
    return entry.explainer.is_valid(content)


# the files


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid_by_the_schema_it_is_named_for(path: Path) -> None:
    event = load(path)
    entry = chosen(event["type"], event["content"])
    assert entry.name == path.stem.partition("~")[0]
    assert entry.problems(event["content"]) == []
    assert by_jsonschema(entry, event["content"])
    assert (entry.kind == "state") == ("state_key" in event)
    if entry.kind == "state":
        assert entry.state_key_problem(event["state_key"]) is None


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_invalid_example_fails_at_its_pointers(path: Path) -> None:
    event = load(path)
    entry = chosen(event["type"], event["content"])
    found = {(problem.pointer, problem.schema) for problem in entry.problems(event["content"])}
    assert found == {(problem["pointer"], problem["schema"]) for problem in event["problems"]}
    assert not entry.validator.is_valid(event["content"])


def test_every_schema_has_a_valid_and_an_invalid_example() -> None:
    names = {path.stem for path in SCHEMAS}
    assert {path.stem.partition("~")[0] for path in EXAMPLES} == names
    # A schema that only says "object" has no content that fails.
    assert names - {path.stem.partition("~")[0] for path in INVALID} == set()


def test_all_14_events_of_the_first_seed_are_examples() -> None:
    events = [load(path) for path in EXAMPLES]
    credited = [event for event in events if event["$comment"] == "seed 000_de2589593af12162.txt"]
    found = [(event["type"], event["content"].get("msgtype")) for event in credited]
    assert sorted(found, key=str) == sorted(SEED_000, key=str)


@pytest.mark.parametrize("path", [*SCHEMAS, *COMPONENTS], ids=lambda path: path.stem)
def test_schema_is_valid_and_described(path: Path) -> None:
    schema = load(path)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    assert schema["description"]


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_schema_says_what_kind_of_event_it_is(path: Path) -> None:
    schema = load(path)
    assert schema["title"] == path.stem
    assert schema["x-kind"] in ("message", "state")
    is_state = schema["x-kind"] == "state"
    assert ("x-state-key" in schema) == is_state
    assert isinstance(schema.get("x-empty"), bool) == is_state


@pytest.mark.parametrize("path", [*SCHEMAS, *COMPONENTS], ids=lambda path: path.stem)
def test_every_property_of_a_schema_is_described(path: Path) -> None:
    def properties(part: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(part, dict):
            yield from part.get("properties", {}).items()
            for key, value in part.items():
                if key not in ("if", "then", "else"):  # they name properties that are described elsewhere
                    yield from properties(value)

    assert [name for name, value in properties(load(path)) if not value.get("description")] == []


def test_only_name_topic_and_pinned_events_are_not_cleared_by_an_empty_object() -> None:
    state = {name for name, entry in CATALOGUE.items() if entry.kind == "state"}
    kept = {name for name in state if not CATALOGUE[name].clears_by_empty}
    assert kept == {"m.room.name", "m.room.topic", "m.room.pinned_events"}
    assert not any(entry.clears_by_empty for entry in CATALOGUE.values() if entry.kind == "message")


# the choice


@pytest.mark.parametrize(
    ("event_type", "content", "name"),
    [
        ("m.room.message", TEXT, "m.room.message$m.text"),
        ("m.room.message", {"msgtype": "m.image"}, "m.room.message$m.image"),
        ("m.room.message", {"msgtype": "org.example.poll"}, "m.room.message"),
        ("m.room.message", {"msgtype": 1}, "m.room.message"),
        ("m.room.message", {}, "m.room.message"),
        ("m.room.name", {"msgtype": "m.text"}, "m.room.name"),
        ("m.room.message.feedback", {}, "m.room.message.feedback"),
        ("org.example.reading", {}, None),
        ("org.example.reading", TEXT, None),
        ("components/mxc_uri", {}, None),
        ("", {}, None),
        ("m.room.message$m.image", {}, None),
    ],
)
def test_most_specific_schema_is_chosen(event_type: str, content: Any, name: str | None) -> None:
    entry = CATALOGUE.select(event_type, content)
    assert (entry.name if entry else None) == name


def test_unknown_msgtype_is_held_to_the_base_schema() -> None:
    entry = chosen("m.room.message", {"msgtype": "org.example.poll"})
    assert [problem.pointer for problem in entry.problems({"msgtype": "org.example.poll"})] == ["/body"]
    assert entry.problems({"msgtype": "org.example.poll", "body": "", "url": 5}) == []


def test_unknown_event_type_requires_nothing() -> None:
    assert CATALOGUE.required("org.example.reading") == frozenset()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_extra_keys_are_allowed(path: Path) -> None:
    event = load(path)
    content = {**event["content"], "io.gitea.commits": [{"id": 1}], "room_id": "!x", "": None}
    assert chosen(event["type"], content).problems(content) == []


@pytest.mark.parametrize("msgtype", ["m.text", "m.notice", "m.emote", "org.example.poll"])
def test_body_of_a_message_may_be_empty(msgtype: str) -> None:
    assert chosen("m.room.message", {"msgtype": msgtype}).problems({"msgtype": msgtype, "body": ""}) == []


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("x" * 255, True),
        ("x" * 256, False),
        ("é" * 127 + "x", True),
        ("é" * 128, False),
        ("😀" * 64, False),
        ("", True),
    ],
)
def test_room_name_is_measured_in_bytes_by_both_engines(name: str, valid: bool) -> None:
    entry = CATALOGUE["m.room.name"]
    assert entry.validator.is_valid({"name": name}) is valid
    assert by_jsonschema(entry, {"name": name}) is valid
    assert [problem.pointer for problem in entry.problems({"name": name})] == ([] if valid else ["/name"])


@pytest.mark.parametrize("key", ["avatar_url", "displayname"])
def test_profile_of_a_member_may_be_null(key: str) -> None:
    assert CATALOGUE["m.room.member"].problems({"membership": "join", key: None}) == []


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("m.room.name", ["", None], ["x"]),
        ("m.room.member", ["@a:b", "@a:b:80"], ["", "a", "@a", "@a:", "!a:b"]),
        ("m.space.child", ["!a:b", "!a"], ["", "#a:b"]),
        ("m.room.third_party_invite", ["token"], [""]),
        ("m.room.image_pack", ["", "pack"], []),
        ("m.policy.rule.user", ["", "rule:@a:b"], []),
    ],
)
def test_state_key_is_held_to_its_schema(name: str, good: list[str | None], bad: list[str]) -> None:
    entry = CATALOGUE[name]
    assert [key for key in good if key is not None and entry.state_key_problem(key)] == []
    problems = [entry.state_key_problem(key) for key in bad]
    assert {problem.pointer if problem else None for problem in problems} <= {"/state_key"}
    assert len([problem for problem in problems if problem]) == len(bad)


# the two engines

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53 - 1), 2**53 - 1)
    | st.sampled_from(["", "mxc://a/b", "mxc://a/b\n", "m.text", "😀" * 64, "v2", "join", "$x", "geo:1,2", "x" * 60])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CONTENTS = [load(path) for path in EXAMPLES if path.stat().st_size < 4_000]


def _mutated(value: Any, draw: Any) -> Any:
    """The same value with one change at a place that is drawn."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JSON_VALUES)
    copy: Any = value.copy()
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    change = draw(st.sampled_from(["deeper", "remove", "replace", "add"]))
    if change == "remove":
        del copy[place]
    elif change == "replace":
        copy[place] = draw(JSON_VALUES)
    elif change == "add" and isinstance(copy, dict):
        copy[draw(st.sampled_from(["url", "file", "format", "formatted_body", "m.relates_to", "info", "x"]))] = draw(
            JSON_VALUES
        )
    else:
        copy[place] = _mutated(copy[place], draw)
    return copy


@st.composite
def mutated_events(draw: Any) -> tuple[str, Any]:
    event = draw(st.sampled_from(CONTENTS))
    content = event["content"]
    for _ in range(draw(st.integers(1, 3))):
        content = _mutated(content, draw)
        if not isinstance(content, dict):
            content = {"body": content}
    return event["type"], content


@settings(max_examples=200, deadline=None)
@given(mutated_events())
def test_both_engines_agree_on_mutated_examples(event: tuple[str, Any]) -> None:
    event_type, content = event
    entry = chosen(event_type, content)
    valid = entry.validator.is_valid(content)
    assert by_jsonschema(entry, content) is valid
    problems = entry.problems(content)
    assert (problems == []) is valid
    assert {problem.schema for problem in problems} <= {entry.name}
    assert all(problem.pointer == "" or problem.pointer.startswith("/") for problem in problems)


# the wording


@pytest.mark.parametrize(
    ("event_type", "content", "expected"),
    [
        ("m.room.message", {}, ["/body is required", "/msgtype is required"]),
        ("m.room.message", {"msgtype": "m.text", "body": 7}, ["/body must be a string, not an integer"]),
        ("m.room.message", {"msgtype": "m.text", "body": None}, ["/body must be a string, not null"]),
        ("m.room.message", {"msgtype": "m.text", "body": True}, ["/body must be a string, not true"]),
        ("m.room.message", {"msgtype": "m.text", "body": {}}, ["/body must be a string, not an object"]),
        (
            "m.room.message",
            {**TEXT, "format": "org.matrix.custom.html"},
            ["/formatted_body is required, because format is there"],
        ),
        ("m.room.message", {"msgtype": "m.image", "body": ""}, ["/url is required (one of url or file)"]),
        (
            "m.room.message",
            {"msgtype": "m.image", "body": "", "url": "https://x/y", "info": {"w": "10", "h": -1}},
            [
                "/info/h must be at least 0, not -1",
                "/info/w must be an integer, not a string",
                '/url "https://x/y" is not an mxc:// URI',
            ],
        ),
        (
            "m.room.message.feedback",
            {"target_event_id": "$x", "type": "seen"},
            ['/type must be one of "delivered", "read", not "seen"'],
        ),
        (
            "m.room.member",
            {"membership": "join", "displayname": 1},
            ["/displayname must be a string or null, not an integer"],
        ),
        ("m.room.name", {"name": "é" * 200}, ["/name is 400 bytes of UTF-8, more than 255"]),
        ("m.room.pinned_events", {"pinned": ["$a", 1]}, ["/pinned/1 must be a string, not an integer"]),
        ("m.room.pinned_events", {"pinned": "$a"}, ["/pinned must be an array, not a string"]),
    ],
)
def test_mistakes_are_put_into_words(event_type: str, content: Any, expected: list[str]) -> None:
    problems = chosen(event_type, content).problems(content)
    assert [f"{problem.pointer} {problem.message}" for problem in problems] == expected


def test_pointer_of_a_mistake_is_escaped() -> None:
    problems = CATALOGUE["m.room.power_levels"].problems({"users": {"@a/b~c:d": "100"}})
    assert [problem.pointer for problem in problems] == ["/users/@a~1b~0c:d"]


def test_wrong_value_is_not_repeated_whole() -> None:
    (wrong,) = CATALOGUE["m.room.member"].problems({"membership": "x" * 50_000})
    assert len(wrong.message) < 200


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.room.pinned_events", {"pinned": [1] * 10_000}),
        ("m.room.power_levels", {"users": {f"@{number}:x": "y" for number in range(10_000)}}),
        ("m.room.image_pack", {"images": {str(number): {"info": 1} for number in range(10_000)}}),
        ("m.call.candidates", {"call_id": "x", "version": 0, "candidates": [{}] * 10_000}),
    ],
)
def test_10000_mistakes_are_cut_at_100_within_a_second_of_work(name: str, content: Any) -> None:
    CATALOGUE[name].problems({"": 1})  # imports the second engine
    started = time.process_time()
    problems = CATALOGUE[name].problems(content)
    assert time.process_time() - started < 1
    assert 0 < len(problems) <= 100


# FLOWBRIDGE_SCHEMAS_DIR


def write(folder: Path, name: str, schema: Any) -> None:
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema))


def message(**more: Any) -> dict[str, Any]:
    return {"x-kind": "message", "type": "object", **more}


def test_file_of_the_users_folder_wins(tmp_path: Path) -> None:
    write(tmp_path, "m.room.name", {"x-kind": "state", "x-state-key": {"const": ""}, "required": ["name", "lang"]})
    catalogue = Catalogue.load(tmp_path)
    assert [problem.pointer for problem in catalogue["m.room.name"].problems({"name": "x" * 999})] == ["/lang"]
    assert catalogue.required("m.room.name") == {"name", "lang"}
    assert len(catalogue) == len(CATALOGUE)


def test_rules_for_all_types_hold_whatever_the_users_folder_replaces(tmp_path: Path) -> None:
    write(tmp_path, "m.room.redaction", message())
    write(tmp_path / "components", "mentions", {})
    write(tmp_path / "components", "event", {})
    catalogue = Catalogue.load(tmp_path)
    found = catalogue.general_problems("m.room.redaction", {"redacts": "x", "m.mentions": {"user_ids": [None]}})
    assert [problem.pointer for problem in found] == ["/m.mentions/user_ids/0", "/redacts"]
    assert catalogue.general_problems("m.room.message", {"msgtype": "m.text"}) == []


def test_users_folder_adds_an_event_type(tmp_path: Path) -> None:
    write(tmp_path, "org.example.reading", message(required=["celsius"], properties={"celsius": {"type": "integer"}}))
    write(tmp_path, "org.example.site", {"x-kind": "state", "x-state-key": {"type": "string"}})
    catalogue = Catalogue.load(tmp_path)
    assert catalogue["org.example.reading"].kind == "message"
    assert catalogue["org.example.site"].kind == "state"
    assert [problem.message for problem in catalogue["org.example.reading"].problems({})] == ["is required"]
    assert catalogue["org.example.site"].clears_by_empty


def test_users_folder_adds_a_msgtype_that_builds_on_the_base(tmp_path: Path) -> None:
    write(
        tmp_path,
        "m.room.message$org.example.poll",
        message(allOf=[{"$ref": "m.room.message.json"}], required=["question"]),
    )
    catalogue = Catalogue.load(tmp_path)
    entry = catalogue.select("m.room.message", {"msgtype": "org.example.poll"})
    assert entry is not None
    pointers = [problem.pointer for problem in entry.problems({"msgtype": "org.example.poll"})]
    assert pointers == ["/body", "/question"]


def test_component_of_the_users_folder_wins(tmp_path: Path) -> None:
    write(tmp_path, "components/mxc_uri", {"const": "mxc://only/this"})
    entry = Catalogue.load(tmp_path)["m.room.message$m.image"]
    assert entry.problems({"msgtype": "m.image", "body": "", "url": "mxc://only/this"}) == []
    assert len(entry.problems({"msgtype": "m.image", "body": "", "url": "mxc://a/b"})) == 1


def test_examples_of_both_folders_are_found(tmp_path: Path) -> None:
    write(tmp_path, "examples/m.room.name~mine", {"type": "m.room.name", "content": {"name": "mine"}})
    names = [event["content"]["name"] for event in Catalogue.load(tmp_path).examples("m.room.name")]
    assert "mine" in names
    assert len(names) == len(CATALOGUE.examples("m.room.name")) + 1


def test_boolean_schema_inside_allof_is_a_schema(tmp_path: Path) -> None:
    write(tmp_path, "org.example.reading", message(allOf=[True, {"required": ["celsius"]}]))
    assert Catalogue.load(tmp_path).required("org.example.reading") == {"celsius"}


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "",
        "[]",
        '"text"',
        b"\xff".decode("latin-1") + "{",
        {"type": "object"},
        message() | {"x-kind": "event"},
        {"x-kind": "state"},
        {"x-kind": "state", "x-state-key": ""},
        {"x-kind": "state", "x-state-key": {"type": "nonsense"}},
        message(type="nonsense"),
        message(properties=5),
        message(required="body"),
        message(required=5),
        message(allOf=5),
        {"x-kind": "message", "$ref": 5},
        message(allOf=[{"$ref": "http://example.org/schema.json"}]),
        message(allOf=[{"$ref": "HTTPS://example.org/schema.json"}]),
        message(properties={"a": {"items": {"$ref": "file:///etc/passwd"}}}),
        message(allOf=[{"$ref": "//example.org/schema.json"}]),
        message(allOf=[{"$ref": "nowhere.json"}]),
        message(properties={"a": {"$ref": "#/$defs/nowhere"}}),
        message(allOf=[{"$ref": "org.example.bad.json"}]),
        message(properties={"a": {"uniqueItems": True}}),
        message(properties={"a": {"uniqueItems": True, "maxItems": 100_000}}),
        message(properties={"a": {"pattern": "^(a+)+$"}}),
        message(properties={"a": {"pattern": "(x[ab]*y)*"}}),
        message(patternProperties={"^(a+)+$": True}),
        message(properties={"a": {"pattern": "^(?=a)"}}),
        message(properties={"a": {"pattern": "(?<!a)b"}}),
        message(properties={"a": {"pattern": r"(a)\1"}}),
        message(properties={"a": {"pattern": "("}}),
        message(properties={"a": {"x-max-bytes": "255"}}),
        message(properties={"a": {"maximum": 1.5}}),
        "{" + '"x-kind": "message", "required": ["a"], "required": ["b"]' + "}",
    ],
    ids=str,
)
def test_bad_schema_is_one_line_that_names_the_file(tmp_path: Path, schema: Any) -> None:
    write(tmp_path, "org.example.bad", schema)
    with pytest.raises(SchemaError, match=r"org\.example\.bad\.json") as caught:
        Catalogue.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_bounded_unique_items_and_plain_patterns_are_allowed(tmp_path: Path) -> None:
    parts = {
        "a": {"uniqueItems": True, "maxItems": 1_000},
        "b": {"pattern": "^(?:ab)+c*$"},
        "c": {"uniqueItems": False},
    }
    write(tmp_path, "org.example.good", message(properties=parts))
    entry = Catalogue.load(tmp_path)["org.example.good"]
    assert len(entry.problems({"a": [1, 1], "b": "x"})) == 2


# what a schema may cost

ME = {"$ref": "#"}
NOTE = {"$ref": "#/$defs/note"}


def doubling(levels: int) -> dict[str, Any]:
    """A value is checked 2^levels times without any recursion at all."""
    twice = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**twice, f"d{levels}": {"type": "integer"}}}


MULTIPLY: dict[str, tuple[dict[str, Any], str]] = {
    "anyOf": ({"anyOf": [{"properties": {"a": ME}}] * 2}, ""),
    "oneOf": ({"oneOf": [{"properties": {"a": ME}}, {"additionalProperties": ME}]}, ""),
    "allOf": ({"properties": {"x": {"allOf": [{"items": ME}, {"prefixItems": [ME]}]}}}, "/properties/x"),
    "if": ({"if": {"properties": {"a": ME}}, "then": {"properties": {"a": ME}}}, ""),
    "not": ({"not": {"properties": {"a": ME}}, "properties": {"a": ME}}, ""),
    "beside a pattern": ({"properties": {"ab": ME}, "patternProperties": {"^a": ME}}, ""),
    "two patterns": ({"patternProperties": {"^a": ME, "b$": ME}}, ""),
    "contains": ({"items": ME, "contains": ME}, ""),
    "dependentSchemas": ({"dependentSchemas": {"a": {"properties": {"b": ME}}}, "properties": {"b": ME}}, ""),
    "unevaluatedProperties": ({"allOf": [{"properties": {"a": ME}}], "unevaluatedProperties": False}, ""),
    "a definition": (
        {
            "properties": {"note": NOTE},
            "$defs": {"note": {"anyOf": [{"items": NOTE}, {"type": "array", "items": {"$ref": "#/$defs/note"}}]}},
        },
        "/$defs/note",
    ),
    "an anchor": ({"$anchor": "me", "anyOf": [{"items": {"$ref": "#me"}}, {"items": ME}]}, ""),
    "a dynamic anchor": ({"$dynamicAnchor": "me", "anyOf": [{"items": {"$dynamicRef": "#me"}}] * 2}, ""),
    "no recursion": (doubling(30), "/$defs/d16"),
}


@pytest.mark.parametrize("name", MULTIPLY)
def test_schema_whose_recursion_multiplies_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    schema, pointer = MULTIPLY[name]
    write(tmp_path, "org.example.bad", message(**schema))
    with pytest.raises(SchemaError, match="of a payload of 64 levels more than 50000 times") as caught:
        Catalogue.load(tmp_path)
    assert str(caught.value).startswith(f"org.example.bad.json: {pointer}".rstrip() + " checks")


def test_schema_that_refers_to_itself_for_the_same_value_is_refused(tmp_path: Path) -> None:
    circle = {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}
    write(tmp_path, "org.example.bad", message(properties={"x": {"$ref": "#/$defs/a"}}, **{"$defs": circle}))
    with pytest.raises(SchemaError, match=r"org\.example\.bad\.json: /\$defs/. leads in a circle"):
        Catalogue.load(tmp_path)


def test_recursion_by_way_of_a_component_is_refused_too(tmp_path: Path) -> None:
    write(tmp_path, "components/part", {"properties": {"a": {"$ref": "../org.example.bad.json"}}})
    part = {"$ref": "components/part.json"}
    write(tmp_path, "org.example.bad", message(anyOf=[part, part]))
    with pytest.raises(SchemaError, match="again and again"):
        Catalogue.load(tmp_path)


HARMLESS: dict[str, dict[str, Any]] = {
    "a tree": {"properties": {"children": {"type": "array", "items": ME}, "n": {"type": "integer"}}},
    "left and right": {"properties": {"left": ME, "right": ME, "n": {"type": "integer"}}},
    "a choice of keys": {"anyOf": [{"properties": {"and": ME}}, {"properties": {"or": ME}}]},
    "any JSON": {"additionalProperties": {"anyOf": [{"type": "string"}, ME, {"type": "array", "items": ME}]}},
    "patterns apart": {"patternProperties": {"^a-": ME, "^b-": ME}, "additionalProperties": ME},
    "a closed tree": {"properties": {"children": {"items": ME}}, "unevaluatedProperties": False},
    "a dynamic tree": {"$dynamicAnchor": "node", "properties": {"children": {"items": {"$dynamicRef": "#node"}}}},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_schema_that_recurses_without_multiplying_is_used(tmp_path: Path, name: str) -> None:
    write(tmp_path, "org.example.good", message(**HARMLESS[name]))
    entry = Catalogue.load(tmp_path)["org.example.good"]
    deep: Any = {}
    for _ in range(30):
        deep = {"children": [deep]} if "tree" in name else {"left": deep}
    began = time.process_time()
    entry.problems(deep)
    assert time.process_time() - began < 2


def test_our_own_schemas_multiply_nothing(tmp_path: Path) -> None:
    Catalogue.load(tmp_path)


def test_explanation_of_one_mistake_has_a_budget() -> None:
    """2^14 branches in one error, and no end of it in sight: the 741 bytes that stopped everything."""
    schema = message(anyOf=[{"properties": {"a": ME}}] * 2, properties={"n": {"type": "null"}})
    fast = CATALOGUE["m.room.message"].validator
    explainer = Explainer("org.example.bad", schema, fast, BASE_URI, {"org.example.bad": schema})
    content: Any = {"n": "wrong"}
    for _ in range(60):
        content = {"a": content}
    assert len(json.dumps(content, separators=(",", ":"))) < 741
    began = time.process_time()
    (problem,) = explainer.problems(content)
    assert time.process_time() - began < 2
    assert "to say where" in problem.message


def test_each_payload_has_a_budget_of_its_own() -> None:
    entry = chosen("m.room.message", {"msgtype": "m.image"})
    expected = entry.problems({"msgtype": "m.image"})
    poor = Explainer(entry.name, entry.schema, entry.validator, BASE_URI, entry.documents, max_steps=3)
    assert "to say where" in poor.problems({"msgtype": "m.image"})[0].message
    assert entry.problems({"msgtype": "m.image"}) == expected


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="nowhere is not a folder"):
        Catalogue.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("event_type", "nearest"),
    [("m.room.mesage", "m.room.message"), ("m.rom.topic", "m.room.topic"), ("m.reactions", "m.reaction")],
)
def test_type_that_matrix_does_not_have_is_told_the_nearest(event_type: str, nearest: str) -> None:
    with pytest.raises(BadRequest, match=f"the nearest is {nearest}\\."):
        Catalogue.load().check_type(event_type)


@pytest.mark.parametrize(
    "event_type",
    ["m.room.message", "m.room.retention", "m.poll.start", "org.example.alert", "im.vector.x", "message", "m"],
)
def test_type_of_matrix_or_of_ones_own_passes(event_type: str) -> None:
    Catalogue.load().check_type(event_type)


def test_type_like_none_of_matrix_is_told_how_to_name_it() -> None:
    with pytest.raises(BadRequest, match=r"no event type m\.qqqqqqqqqqqqqqqqqqqqqq\. A type of your own"):
        Catalogue.load().check_type("m.qqqqqqqqqqqqqqqqqqqqqq")


def test_every_type_that_the_documents_print_passes() -> None:
    catalogue = Catalogue.load()
    for path in sorted((built_in() / "examples").glob("*.json")):
        catalogue.check_type(json.loads(path.read_bytes())["type"])
