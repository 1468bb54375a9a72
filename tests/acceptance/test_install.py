"""What a user gets from a wheel."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from flowbridge.events import Catalogue, built_in
from tests.patience import PATIENCE

PROJECT = Path(__file__).parents[2]


def test_wheel_holds_every_schema(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("flowbridge/schemas/") for name in archive.namelist() if "/schemas/" in name}
    assert packed == {path.relative_to(built_in()).as_posix() for path in built_in().rglob("*.json")}


def test_schemas_are_found_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the wheel's own files, not the checkout, and this environment's packages."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python3*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    here = next(path for path in map(Path, sys.path) if (path / "jsonschema_rs").is_dir())
    script = (
        f"import sys; sys.path.append({str(here)!r}); import json; from flowbridge.events import *; "
        "print(json.dumps([str(built_in()), sorted(Catalogue.load())]))"
    )
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    folder, names = json.loads(done.stdout)
    assert Path(folder) == site / "flowbridge" / "schemas"
    assert names == sorted(Catalogue.load())


def test_schemas_are_found_from_an_editable_install() -> None:
    assert built_in() == PROJECT / "schemas"
