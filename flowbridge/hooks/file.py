"""`hooks.yaml`: hooks that an operator keeps in a file, which alone can change them."""

from pathlib import Path
from typing import Any

from flowbridge.errors import BadContent
from flowbridge.hooks import definition
from flowbridge.hooks.definition import Definition
from flowbridge.models.hooks import TOKEN
from flowbridge.settings import SettingsError
from flowbridge.store.hooks import MAX_HOOKS

NAME = "FLOWBRIDGE_HOOKS_FILE"
MAX_BYTES = 4 * 1024 * 1024
MAX_SHOWN = 5  # problems of one file, in one line
_WRONG_TAG = "a value is not what its tag, or its form, says: put it in quotes"


def load(path: Path) -> dict[str, Definition]:
    """The hooks of a file, by name. Raises SettingsError: one line, without secrets."""
    import yaml  # most bridges have no such file

    try:
        text = _text(path)
        value = yaml.load(text, _loader(yaml))  # noqa: S506 (a SafeLoader)
    except SettingsError:
        raise
    except yaml.MarkedYAMLError as error:
        at = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(f"{NAME}: {path} is not YAML: {error.problem or error.context}{at}") from None
    except OSError as error:
        raise SettingsError(f"{NAME}: cannot read {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{NAME}: {path} is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise SettingsError(f"{NAME}: {path} is not YAML: it is nested too deeply") from None
    except Exception as error:  # PyYAML's of `!!int ""`, and others: they may hold the value, which may be a secret
        raise SettingsError(f"{NAME}: {path} is not YAML: {_WRONG_TAG} ({type(error).__name__})") from None
    return _definitions(path, value)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise SettingsError(f"{NAME}: {path} is not YAML: it is larger than {MAX_BYTES // 1024**2} MiB")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"{NAME}: {path} is not YAML: it is not UTF-8") from None


def _loader(yaml: Any) -> Any:
    """safe_load's, without aliases: nine lines of them make a billion values."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem="aliases (*name) are not taken", problem_mark=mark)
            return super().compose_node(parent, index)

    return Loader


def _definitions(path: Path, value: Any) -> dict[str, Definition]:
    if value is None:
        return {}
    if isinstance(value, dict) and set(value) == {"hooks"}:
        value = value["hooks"]
    if not isinstance(value, list):
        raise SettingsError(f"{NAME}: {path}: must be a list of hooks, each as POST /hooks takes it")
    if len(value) > MAX_HOOKS:
        raise SettingsError(f"{NAME}: {path}: holds {len(value)} hooks; there may be {MAX_HOOKS}")
    found: dict[str, Definition] = {}
    problems = []
    for index, each in enumerate(value):
        try:
            read = definition.read(each, fixed=True)
        except BadContent as error:
            problems += [f"/{index}{problem.pointer} {problem.message}" for problem in error.problems]
            continue
        if read.hook.name in found:
            problems.append(f"/{index}/name is that of another hook of the file, {read.hook.name}")
        found[read.hook.name] = read
    tokens: dict[str, str] = {}
    for name, read in found.items():
        for secret in read.secrets if read.hook.verification.scheme == TOKEN else ():
            if tokens.setdefault(secret, name) != name:
                problems.append(f"{name} and {tokens[secret]} have the same token: a token says which hook it is")
    if problems:
        more = f" (and {len(problems) - MAX_SHOWN} more)" if len(problems) > MAX_SHOWN else ""
        raise SettingsError(f"{NAME}: {path}: {'; '.join(problems[:MAX_SHOWN])}{more}")
    return found
