"""flowbridge.events.canonical_json: what is JSON for Matrix, and what is not."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowbridge.errors import BadContent, NotJson
from flowbridge.events import canonical_json

LARGEST = 2**53 - 1

LEGAL = st.recursive(
    st.none() | st.booleans() | st.integers(-LARGEST, LARGEST) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
JSONISH = st.text(alphabet='[]{}",:\\ \n0123456789.eE+-truefalsnNIyud8/\x00é', max_size=40)


def pointers(raw: str | bytes) -> list[str]:
    document = canonical_json.read(raw if isinstance(raw, bytes) else raw.encode())
    found = canonical_json.problems(document.value)
    assert not (document.clean and found)
    return [problem.pointer for problem in found]


@pytest.mark.parametrize(
    "number", ["1.0", "0.5", "-0.0", "1e5", "1E5", "1e400", "-1e-400", "NaN", "Infinity", "-Infinity"]
)
def test_number_that_is_no_integer_is_refused_with_its_pointer(number: str) -> None:
    assert pointers(f'{{"ok": 1, "info": {{"w": [{number}]}}}}') == ["/info/w/0"]


@pytest.mark.parametrize("number", [str(LARGEST), str(-LARGEST), "0", "-0", "1"])
def test_integer_within_the_bounds_is_read(number: str) -> None:
    document = canonical_json.read(number.encode())
    assert (document.value, document.clean) == (int(number), True)


@pytest.mark.parametrize("number", [str(LARGEST + 1), str(-LARGEST - 1), str(2**64), "9" * 17, "9" * 18])
def test_integer_beyond_the_bounds_is_refused_with_its_pointer(number: str) -> None:
    assert pointers(f'{{"n": {number}}}') == ["/n"]


@pytest.mark.parametrize("sign", ["", "-"])
def test_integer_of_10000_digits_is_refused_and_not_repeated_whole(sign: str) -> None:
    (problem,) = canonical_json.problems(canonical_json.read(f"[{sign}{'9' * 10_000}]".encode()).value)
    assert problem.pointer == "/0"
    assert len(problem.message) < 100


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        ('{"a": 1, "a": 2}', ["/a"]),
        ('{"a": 1, "b": 0, "a": 1, "a": 1}', ["/a"]),
        ('{"a": {"b": [{"c": 1, "c": 2}]}}', ["/a/b/0/c"]),
        ('{"a": 1, "\\u0061": 2}', ["/a"]),
        ('{"": 1, "": 2}', ["/"]),
    ],
)
def test_duplicate_key_is_refused_with_its_pointer(raw: str, at: list[str]) -> None:
    assert pointers(raw) == at


def test_same_key_in_two_objects_is_no_duplicate() -> None:
    assert pointers('[{"a": {"a": 1}}, {"a": 2}]') == []


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        (r'{"a": "\ud800"}', ["/a"]),
        (r'{"a": "\uDFFF"}', ["/a"]),
        (r'{"a": "\udc00\ud800"}', ["/a"]),
        (r'["ok", "\ud83d x"]', ["/1"]),
        (r'{"\ud800": 1}', ["/?"]),
    ],
)
def test_lone_surrogate_is_refused_with_its_pointer(raw: str, at: list[str]) -> None:
    assert pointers(raw) == at


@pytest.mark.parametrize("raw", [r'"\ud83d\ude00"', r'"\uD83D\uDE00"', '"😀"'])
def test_surrogate_pair_is_a_character(raw: str) -> None:
    assert canonical_json.read(raw.encode()).value == "😀"
    assert pointers(raw) == []


@pytest.mark.parametrize("raw", [r'"\\ud800"', r'{"\\uDC00": 1}'])
def test_escaped_backslash_before_a_u_is_no_surrogate(raw: str) -> None:
    assert pointers(raw) == []


def test_escaped_nul_is_text() -> None:
    document = canonical_json.read(rb'{"body": "a\u0000b"}')
    assert document.value == {"body": "a\0b"}
    assert canonical_json.write(document.value) == rb'{"body":"a\u0000b"}'


def test_byte_order_mark_is_skipped() -> None:
    assert canonical_json.read(b'\xef\xbb\xbf{"a": 1}').value == {"a": 1}


@pytest.mark.parametrize("raw", [b'{"a": "\xff"}', b'"\xc3"', b'"\xed\xa0\x80"', '"hi"'.encode("utf-16")])
def test_body_that_is_not_utf8_is_not_json(raw: bytes) -> None:
    with pytest.raises(NotJson, match="UTF-8"):
        canonical_json.read(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "",
        " ",
        "\ufeff",
        "{",
        "{]",
        '{"a"}',
        "{a: 1}",
        "'a'",
        "[1,]",
        "01",
        "+1",
        ".5",
        "nan",
        "{} {}",
        '"a\nb"',
        r'"\x"',
        "\0",
    ],
)
def test_what_is_no_json_text_is_not_json(raw: str) -> None:
    with pytest.raises(NotJson):
        canonical_json.read(raw.encode())


def test_not_json_says_where() -> None:
    with pytest.raises(NotJson, match="line 2 column 6"):
        canonical_json.read(b'{\n "a" 1}')


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_64_levels_are_read_and_65_are_refused(opening: str, closing: str) -> None:
    assert canonical_json.read((opening * 64 + "1" + closing * 64).encode()).clean
    assert canonical_json.read(("[{}," + opening * 63 + "1" + closing * 63 + "]").encode()).clean
    with pytest.raises(BadContent, match="64 levels"):
        canonical_json.read((opening * 65 + "1" + closing * 65).encode())


@pytest.mark.parametrize("text", ["[{" * 500, '\\"' + "[" * 500, "\\\\", "{" * 70 + '\\"'])
def test_brackets_inside_strings_are_no_levels(text: str) -> None:
    raw = f'{{"{text}": ["{text}", {{"a": "{text}"}}]}}'
    assert canonical_json.read(raw.encode()).clean


def test_many_brackets_side_by_side_are_no_levels() -> None:
    assert canonical_json.read(b"[" + b"[],{}," * 1_000 + b"[]]").clean


@pytest.mark.parametrize(
    "raw",
    [b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000, b'"' + b"[" * 200_000, b'["' * 200_000],
)
def test_200000_brackets_are_refused_within_a_second(raw: bytes) -> None:
    started = time.process_time()
    with pytest.raises((BadContent, NotJson)):
        canonical_json.read(raw)
    assert time.process_time() - started < 1


def test_all_problems_are_listed_with_escaped_pointers() -> None:
    raw = r"""{"a/b": 1.5, "m~n": [true, {"": NaN}], "k": 1, "k": 99999999999999999999, "s": "\ud800", "~1": 1e3}"""
    assert sorted(pointers(raw)) == ["/a~1b", "/k", "/k", "/m~0n/1/", "/s", "/~01"]


def test_more_than_100_problems_are_cut() -> None:
    assert len(pointers("[" + ",".join(["0.5"] * 10_000) + "]")) == 100


def test_duplicates_looks_only_at_the_object_itself() -> None:
    value = canonical_json.read(b'{"a": 1, "a": {"b": 1, "b": 2}}').value
    assert [problem.pointer for problem in canonical_json.duplicates(value)] == ["/a"]
    assert canonical_json.duplicates({"a": 1}) == []
    assert canonical_json.duplicates("text") == []


def test_written_json_is_canonical() -> None:
    value = {"b": [1, None, True, "é/\u2028\x7f"], "a": {}, "😀": 1, "\uffff": -1, "A": '"\\\n'}
    assert (
        canonical_json.write(value)
        == '{"A":"\\"\\\\\\n","a":{},"b":[1,null,true,"é/\u2028\x7f"],"\uffff":-1,"😀":1}'.encode()
    )


def test_float_is_never_written_as_not_a_number() -> None:
    with pytest.raises(ValueError, match="float"):
        canonical_json.write(float("nan"))


@settings(max_examples=200, deadline=None)
@given(LEGAL)
@example({"\0": "\x7f\u2028\U0010ffff"})
def test_what_is_written_is_read_again(value: Any) -> None:
    written = canonical_json.write(value)
    document = canonical_json.read(written)
    assert document.value == value
    assert canonical_json.problems(document.value) == []
    assert canonical_json.write(document.value) == written


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.just("\ud800")
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.just("\udfff") | st.none() | st.floats(), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=500, deadline=None)
@given(ANY, st.booleans())
def test_whatever_is_written_is_what_python_writes(value: Any, without_c: bool) -> None:
    python = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def outcome(write: Callable[[Any], bytes]) -> Any:
        try:
            return write(value)
        except Exception as error:
            return type(error), str(error)

    with pytest.MonkeyPatch.context() as patch:
        if without_c:
            patch.setattr(canonical_json, "_PIECES", None)
        assert outcome(canonical_json.write) == outcome(lambda value: python.encode(value).encode())


@settings(max_examples=200, deadline=None)
@given(LEGAL)
def test_any_other_spelling_is_read_the_same(value: Any) -> None:
    spelled = json.dumps(value, ensure_ascii=True, indent=1).encode()
    document = canonical_json.read(spelled)
    assert document.value == value
    assert canonical_json.problems(document.value) == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | JSONISH.map(str.encode))
def test_arbitrary_bytes_raise_nothing_but_an_answer(raw: bytes) -> None:
    try:
        document = canonical_json.read(raw)
    except (NotJson, BadContent):
        return
    found = canonical_json.problems(document.value)
    assert not (document.clean and found)
    if not found:
        assert canonical_json.read(canonical_json.write(document.value)).value == document.value


@settings(max_examples=200, deadline=None)
@given(JSONISH)
def test_syntax_is_judged_as_python_judges_it(text: str) -> None:
    def accepted(read: Any, raw: Any) -> bool:
        try:
            read(raw)
        except (ValueError, NotJson):
            return False
        return True

    assert accepted(canonical_json.read, text.encode()) == accepted(json.loads, text)


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_line_break_in_a_string_is_told_with_the_way_to_write_it(line_break: str) -> None:
    with pytest.raises(NotJson) as caught:
        canonical_json.read(f'{{"body": "a {line_break}b"}}'.encode())
    assert "a line break inside a string at line 1 column 13 (write it as \\n)" in caught.value.error
