"""What the tests of the documents stand on."""

from pathlib import Path

import pytest

from tests.transcripts import Step, blocks, check, section, steps

PAGE = """# Title

## First

```console
$ echo one \\
    'two
    three'
one two
    three
$ true
```

## Second

```sh
echo not a transcript
```

```console
$ false
```
"""


def test_commands_are_read_with_their_continuation_and_output() -> None:
    assert steps(PAGE) == [
        Step("echo one \\\n    'two\n    three'", "one two\n    three\n"),
        Step("true", ""),
        Step("false", ""),
    ]


def test_sections_and_blocks_are_apart() -> None:
    assert [step.command for step in steps(section(PAGE, "Second"))] == ["false"]
    assert blocks(PAGE, "sh") == ["echo not a transcript\n"]


@pytest.mark.parametrize(
    ("output", "printed", "same"),
    [
        ("one\n", "one", True),
        ("one\n", "one\ntwo\n", False),
        ("one\n", "", False),
        ("a … c\n", "a b c\n", True),
        ("a … c\n", "a b\nc\n", False),
        ("a.c\n", "abc\n", False),
        ("…\nlast\n", "first\nsecond\nlast\n", True),
        ("…\nlast\n", "last\n", True),
        ("first\n…\n", "first\nsecond\n", True),
        ("first\n…\n", "second\n", False),
    ],
)
def test_ellipsis_stands_for_the_rest_of_a_line_or_for_lines(output: str, printed: str, same: bool) -> None:
    assert Step("", output).is_printed(printed) is same


def test_transcript_that_is_not_true_is_found(tmp_path: Path) -> None:
    check([Step("A=1", ""), Step("echo $A; false", "1\n")], tmp_path, {"PATH": "/usr/bin:/bin"})
    for step in (Step("false", ""), Step("echo 1", "2\n")):
        with pytest.raises(AssertionError):
            check([Step("true", ""), step], tmp_path, {"PATH": "/usr/bin:/bin"})
