"""What documents show: fenced blocks, and in `console` blocks what a reader types and what is printed then."""

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.patience import PATIENCE

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STEP = re.compile(r"^\$ (.*(?:\n    .*)*)\n?((?:(?!\$ ).*\n)*)", re.MULTILINE)
_END = "--- end of a step:"


@dataclass(frozen=True)
class Step:
    """A command, with its continuation lines (indented by four), and what the document says that it prints.

    In the output `…` stands for anything on its line, and alone on a line for any lines.
    """

    command: str
    output: str

    def is_printed(self, printed: str) -> bool:
        lines = [
            r"(?:.*\n)*?" if line == "…" else "[^\n]*".join(map(re.escape, line.split("…"))) + r"\n"
            for line in self.output.splitlines()
        ]
        return re.fullmatch("".join(lines), printed if printed.endswith("\n") else printed + "\n") is not None


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks in this language, in their order."""
    return [block for name, block in _BLOCK.findall(text) if name == language]


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level, up to the next one."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def steps(text: str) -> list[Step]:
    """The commands of all console blocks."""
    return [Step(*found) for block in blocks(text, "console") for found in _STEP.findall(block)]


def replaced(text: str, values: Mapping[str, str]) -> str:
    """A document with the names of this world for those that it gives as examples."""
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def play(script: Sequence[Step], folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[Step, int, str]]:
    """Run the commands in one shell. Yields each with its exit code and what it printed, on both outputs."""
    lines = [f"{{ {step.command}\n}} 2>&1; printf '\\n{_END} %s\\n' $?" for step in script]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    printed = re.split(rf"\n{_END} (\d+)\n", done.stdout)
    assert len(printed) == 2 * len(script) + 1, done.stdout + done.stderr
    for step, text, code in zip(script, printed[::2], printed[1::2], strict=False):
        yield step, int(code), text


def check(script: Sequence[Step], folder: Path, environment: Mapping[str, str]) -> None:
    """Each command must print what stands below it; one with nothing below it must succeed."""
    for step, code, printed in play(script, folder, environment):
        if step.output:
            assert step.is_printed(printed), f"$ {step.command}\nprinted\n{printed}\nand not\n{step.output}"
        else:
            assert code == 0, f"$ {step.command}\nended with {code}:\n{printed}"
