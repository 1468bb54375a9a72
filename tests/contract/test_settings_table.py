"""The README's table of settings, against the settings: each is in it, with its default, and nothing else is."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from flowbridge.cli.main import serve
from flowbridge.settings import Settings

README = Path(__file__).parents[2] / "README.md"
NONE = "\N{EN DASH}"
UNITS = {"MiB": 1024**2, "GiB": 1024**3}
# What is no value, but says what happens without one.
IN_WORDS = {
    "FLOWBRIDGE_SECRET_KEY": "`<database>.key`",
    "FLOWBRIDGE_PUBLIC_URL": "from the request",
    "FLOWBRIDGE_KEEP_CONTENT_DAYS": "as long",
    "FLOWBRIDGE_ENCRYPTED_ROOMS": "`encrypt` with the extra `e2ee`; else `refuse`",
}


def table(text: str) -> dict[str, str]:
    """Setting → default, as they are written. A name like `_X` is short for `FLOWBRIDGE_X`."""
    section = re.split(r"^## ", text.split("\n## Settings\n")[1], flags=re.MULTILINE)[0]
    found: dict[str, str] = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \| .+ \|$", section, re.MULTILINE):
        names = [re.sub("^_", "FLOWBRIDGE_", name) for name in re.findall(r"`(\w+)`", row[0])]
        defaults = row[1].split(", ")
        defaults = defaults * len(names) if len(defaults) == 1 else defaults
        for name, default in zip(names, defaults, strict=True):
            assert name not in found, f"{name} is there twice"
            found[name] = default
    return found


def settings() -> dict[str, Any]:
    """Setting → default; None also for one that depends on what is installed."""
    fields = Settings.model_fields.values()
    found = {str(field.validation_alias): None if field.default_factory else field.default for field in fields}
    del found["SECRET=FILES"]
    options = inspect.signature(serve).parameters
    return {**found, "FLOWBRIDGE_HOST": options["host"].default, "FLOWBRIDGE_PORT": options["port"].default}


def says(text: str, default: Any) -> bool:
    """Whether a cell of the table says this default."""
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default in (None, ()):
        return text == NONE
    if isinstance(default, tuple):
        default = ", ".join(default)
    if isinstance(default, bool):
        return text in (("`on`", "`1`") if default else ("`off`", "`0`"))
    if isinstance(default, int | float):
        number, _, unit = text.strip("`").partition(" ")
        return float(number) * UNITS.get(unit, 1) == default
    return bool(text == f"`{default}`")


def test_table_has_every_setting_and_no_other() -> None:
    assert sorted(table(README.read_text())) == sorted(settings())


@pytest.mark.parametrize("name", sorted(settings()))
def test_table_has_the_default(name: str) -> None:
    text, default = table(README.read_text())[name], settings()[name]
    if name in IN_WORDS:
        assert (text, default) == (IN_WORDS[name], None)
    else:
        assert says(text, default), f"the README has {text}, the setting {default!r}"


@pytest.mark.parametrize(
    ("text", "default", "same"),
    [
        (NONE, None, True),
        (NONE, (), True),
        ("`own`", ("own",), True),
        ("`own`", ("all",), False),
        (NONE, 0, False),
        ("`on`", True, True),
        ("`on`", False, False),
        ("`0`", False, True),
        ("`10`", 10.0, True),
        ("`10`", 1, False),
        ("256 MiB", 256 * 1024**2, True),
        ("1 GiB", 1024**2, False),
        ("`text`", "text", True),
        ("text", "text", False),
        ("`sqlite:///a`", SecretStr("sqlite:///a"), True),
    ],
)
def test_comparison_can_fail(text: str, default: Any, *, same: bool) -> None:
    if text == NONE and default == 0:
        with pytest.raises(ValueError, match="could not convert"):
            says(text, default)
    else:
        assert says(text, default) is same
