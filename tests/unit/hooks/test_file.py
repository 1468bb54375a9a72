"""flowbridge.hooks.file: hooks.yaml, and what is wrong with it in one line."""

from pathlib import Path

import pytest

from flowbridge.hooks import file
from flowbridge.models.hooks import Hook, Verification
from flowbridge.settings import SettingsError

CANARY = "canary-of-31-visible-characters"
GOOD = f"""
- name: alerts
  room: "#ops:example.org"
  source: generic
  verification: {{scheme: hmac, header: X-Signature, secret: [{CANARY}, {CANARY}-old]}}
  template:
    markdown: |
      **{{{{ payload.title }}}}**
  mention: ["@alice:hs"]
  keep_requests: no
- {{name: ci, room: "!r:hs"}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hooks.yaml"


def test_file_has_the_objects_that_the_api_takes(path: Path) -> None:
    path.write_text(GOOD)
    found = file.load(path)
    assert list(found) == ["alerts", "ci"]
    assert found["alerts"].hook == Hook(
        "alerts",
        "#ops:example.org",
        "generic",
        Verification("hmac", "X-Signature"),
        {"markdown": "**{{ payload.title }}**\n"},
        mention=("@alice:hs",),
        keep_requests=0,
        is_fixed=True,
    )
    assert found["alerts"].secrets == (CANARY, f"{CANARY}-old")
    assert found["ci"].secrets == ()


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]", "hooks: []"])
def test_file_may_have_none(path: Path, text: str) -> None:
    path.write_text(text)
    assert file.load(path) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: ci", "must be a list of hooks, each as POST /hooks takes it"),
        ("- 5", "/0 must be an object"),
        ("- {name: ci, room: '!r:hs', on: push}", "/0/True is unknown here"),
        ("- {name: ci, room: '!r:hs'}\n- {name: ci, room: '!s:hs'}", "/1/name is that of another hook of the file, ci"),
        (
            "\n".join(f"- {{name: {name}, room: '!r:hs', verification: {{secret: {CANARY}}}}}" for name in "ab"),
            "b and a have the same token: a token says which hook it is",
        ),
        ("- {name: ci, room: '!r:hs', verification: {secret: []}}", "/0/verification/secret must be one, or a list of"),
        ("- {name: ci, room: '!r:hs', verification: {secret: [x, y, z]}}", "/0/verification/secret must be one, or a"),
        (f"- {{name: ci, room: 5, verification: {{secret: '{CANARY} '}}}}", "/0/verification/secret must be visible"),
        ("- name: [", "is not YAML: "),
        ("- name: ci\n\troom: x", "is not YAML: found character '\\t' that cannot start any token at line 2"),
        ("- !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor for the tag"),
        ("a: &a [1]\nb: *a", "is not YAML: aliases (*name) are not taken at line 2"),
        ("[" * 5_000, "is not YAML: it is nested too deeply"),
        ("x" * (4 * 1024**2 + 1), "is not YAML: it is larger than 4 MiB"),
        *(  # PyYAML has no error of its own for these
            (f"- {value}", "is not YAML: a value is not what its tag, or its form, says: put it in quotes")
            for value in ('!!int ""', "!!bool x", "!!timestamp x", r'"\UFFFFFFFF"', f"!!int {CANARY}", "2026-99-99")
        ),
    ],
)
def test_what_is_wrong_is_one_line(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(SettingsError) as refused:
        file.load(path)
    line = str(refused.value)
    assert line.startswith(f"FLOWBRIDGE_HOOKS_FILE: {path}")
    assert says in line
    assert "\n" not in line
    assert CANARY not in line


def test_file_that_is_not_there_or_no_text_is_one_line(path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*hooks.yaml: No such file or directory"):
        file.load(path)
    path.write_bytes(b"- name: \xff")
    with pytest.raises(SettingsError, match="is not YAML: it is not UTF-8"):
        file.load(path)


def test_of_many_problems_the_first_are_told(path: Path) -> None:
    path.write_text("- {}\n" * 20)
    with pytest.raises(SettingsError, match=r"/0/name is required.*\(and 35 more\)"):
        file.load(path)


def test_file_may_have_as_many_hooks_as_the_store(path: Path) -> None:
    path.write_text("".join(f"- {{name: n{number}, room: '!r:hs'}}\n" for number in range(1_001)))
    with pytest.raises(SettingsError, match="holds 1001 hooks; there may be 1000"):
        file.load(path)
