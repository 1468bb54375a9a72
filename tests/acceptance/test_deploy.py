"""deploy/: what an operator installs, tried as far as a machine without systemd's own process and a registry can."""

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flowbridge import metrics
from flowbridge.settings import Settings
from tests import processes
from tests.patience import PATIENCE
from tests.processes import REPOSITORY
from tests.upstream import Upstream

DEPLOY = REPOSITORY / "deploy"
UNIT = (DEPLOY / "systemd" / "flowbridge.service").read_text()
COMPOSE = DEPLOY / "compose"
MAX_EXPOSURE = 20  # tenths, as `systemd-analyze security` counts: below it calls a service OK


def _tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def _settings() -> set[str]:
    fields = {"FLOWBRIDGE_HOST", "FLOWBRIDGE_PORT"} | {str(f.validation_alias) for f in Settings.model_fields.values()}
    return fields | {f"{name}_FILE" for name in fields}


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, for the command of this environment."""
    path = tmp_path / "flowbridge.service"
    path.write_text(UNIT.replace("/opt/flowbridge/bin/flowbridge", processes.FLOWBRIDGE))
    return path


def test_systemd_understands_the_unit(unit: Path) -> None:
    said = subprocess.run([_tool("systemd-analyze"), "verify", unit], capture_output=True, text=True, timeout=PATIENCE)
    assert (said.returncode, said.stderr) == (0, "")


def test_unit_exposes_little(unit: Path) -> None:
    command = [_tool("systemd-analyze"), "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(unit)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert said.returncode == 0, said.stdout


def test_stop_of_the_unit_is_longer_than_the_bridge_takes() -> None:
    from flowbridge.models.timing import Timing

    seconds = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert seconds
    assert int(seconds[1]) > 2 * Timing().stop_seconds


def test_secrets_of_compose_are_made_once_and_work(tmp_path: Path) -> None:
    shutil.copy(COMPOSE / "secrets.sh", tmp_path)
    command = [tmp_path / "secrets.sh"]
    subprocess.run(command, input="syt_bot\n", text=True, check=True, capture_output=True, timeout=PATIENCE)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    subprocess.run(command, input="", text=True, check=True, capture_output=True, timeout=PATIENCE)
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    named = {Path(secret["file"]).name for secret in _compose()["secrets"].values()}
    assert set(made) == named
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert made["access-token"] == "syt_bot"
    assert made["database-url"] == f"postgresql+psycopg://flowbridge:{made['postgres-password']}@postgres/flowbridge"
    files: dict[str, Any] = {
        "ACCESS_TOKEN_FILE": str(tmp_path / "secrets" / "access-token"),
        "FLOWBRIDGE_SECRET_KEY_FILE": str(tmp_path / "secrets" / "secret-key"),
    }
    with Upstream() as upstream, processes.serving(cwd=tmp_path, BASE_URL=upstream.url, **files) as (url, _):
        assert httpx.get(f"{url}/readyz", trust_env=False).json()["ready"] is True


def test_no_token_makes_no_secrets(tmp_path: Path) -> None:
    shutil.copy(COMPOSE / "secrets.sh", tmp_path)
    command = [tmp_path / "secrets.sh"]
    said = subprocess.run(command, input="\n", text=True, capture_output=True, timeout=PATIENCE)
    assert said.returncode == 2
    assert not list((tmp_path / "secrets").iterdir())


def test_compose_names_what_is_there() -> None:
    compose = _compose()
    for name in ("bridge-1", "bridge-2"):
        bridge = compose["services"][name]
        assert set(bridge["environment"]) <= _settings()
        mounted = {f"/run/secrets/{secret}" for secret in bridge["secrets"]}
        assert {value for key, value in bridge["environment"].items() if key.endswith("_FILE")} == mounted
        assert (COMPOSE / bridge["build"]["context"] / bridge["build"]["dockerfile"]).is_file()
    written = re.findall(r"^(\w+)=", (COMPOSE / "flowbridge.env").read_text(), re.MULTILINE)
    assert set(written) <= _settings()
    upstreams = re.findall(r"([\w-]+):8090", (COMPOSE / "Caddyfile").read_text())
    assert {"bridge-1", "bridge-2"} <= set(upstreams) <= set(compose["services"])


def test_caddy_understands_the_caddyfile() -> None:
    command = [_tool("caddy"), "validate", "--adapter", "caddyfile", "--config", str(COMPOSE / "Caddyfile")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert said.returncode == 0, said.stderr


def test_container_copies_what_is_there_and_what_is_pinned() -> None:
    lines = (DEPLOY / "Containerfile").read_text()
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", lines, re.MULTILINE) for word in line.split()]
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists()
        assert f"!{source}" in ignored
    everything = set(re.findall(r"^[\w.\[\]-]+==\S+", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE))
    pinned = set(re.findall(r"^[\w.\[\]-]+==\S+", (DEPLOY / "requirements.lock").read_text(), re.MULTILINE))
    assert pinned
    assert pinned <= everything, "make lock"
    environment = re.findall(r"\b(FLOWBRIDGE_\w+)=", lines)
    assert set(environment) <= _settings()


def test_alerts_fire_for_their_faults_and_no_others() -> None:
    command = [_tool("promtool"), "test", "rules", "flowbridge.rules.test.yaml"]
    said = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=PATIENCE)
    assert said.returncode == 0, said.stdout + said.stderr


def test_alerts_and_dashboard_name_metrics_that_exist() -> None:
    shown = metrics.render().decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", shown, re.MULTILINE))
    known = set(kinds) | {f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram"}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "flowbridge.rules.yaml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "flowbridge.json").read_text())
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for expression in expressions for name in re.findall(r"\bflowbridge_\w+", expression)}
    assert len(named) > 15
    assert named <= known
    summed = {name for name in named if kinds.get(name) == "counter"}
    assert all("rate(" in text or "increase(" in text for text in expressions if any(name in text for name in summed))


def _compose() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return value
