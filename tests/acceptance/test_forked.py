"""tests/forked.py: what most tests start says and does what the installed command says and does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import OURS, PACKAGES, Forked
from tests.patience import PATIENCE
from tests.processes import REPOSITORY, environment, run, run_installed, serving

# Imports the packages, then our modules, and prints what one of ours asks for meanwhile, itself or by a package.
IMPORTING = f"""
import importlib, os, random, sys, threading, time

for name in {PACKAGES}:
    importlib.import_module(name)


def told(place, name):
    do = getattr(place, name)

    def asked(*arguments, **more):
        frame = sys._getframe(1)
        while frame and frame.f_globals["__name__"] != "importlib._bootstrap":
            if frame.f_globals["__name__"].partition(".")[0] == "flowbridge":
                print(frame.f_globals["__name__"], name)
                break
            frame = frame.f_back
        return do(*arguments, **more)

    setattr(place, name, asked)


told(os._Environ, "__getitem__")
told(threading.Thread, "start")
told(random, "_urandom")
for name in ("urandom", "getpid", "getcwd"):
    told(os, name)
for name in ("time", "time_ns", "monotonic", "perf_counter"):
    told(time, name)
for name in {OURS}:
    importlib.import_module(name)
"""
HARMLESS = {
    "flowbridge.metrics time",  # when a counter was made, which is in /metrics
    "flowbridge.log time",  # of a blank record: each line has its own
    "flowbridge.log getpid",  # likewise, and no line shows it
    "flowbridge.settings __getitem__",  # pydantic's PYDANTIC_DISABLE_PLUGINS
    "flowbridge.store.outbox urandom",  # SQLAlchemy's name of an alias
}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["--version"], ""),
        (["deliveries", "purge", "--help"], ""),
        (["nonsense"], ""),
        (["keys", "list"], ""),
        (["keys", "revoke", "\udcff"], ""),
        (["validate", "m.room.message"], '{"msgtype": "m.text", "body": "Grüße\\r\\n"}'),
        (["validate", "m.room.message"], '{"msgtype": "m.image"}'),
    ],
)
def test_it_says_what_the_installed_command_says(arguments: list[str], stdin: str) -> None:
    forked, installed = (start(*arguments, stdin=stdin, NO_COLOR="1") for start in (run, run_installed))
    assert forked.returncode == installed.returncode
    assert (forked.stdout, forked.stderr) == (installed.stdout, installed.stderr)


def test_our_modules_learn_nothing_of_the_process_that_imports_them() -> None:
    """Else a forked command would have it of its parent: its environment, its chance, its clock."""
    found = subprocess.run([sys.executable, "-c", IMPORTING], cwd=REPOSITORY, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert "flowbridge.metrics time" in found.stdout  # it does look
    assert set(found.stdout.splitlines()) <= HARMLESS


def test_it_has_its_own_folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE_URL", "ftp://of-the-tests")
    assert run("init", FLOWBRIDGE_DATABASE_URL="sqlite:///mine.db").returncode == 0
    assert (tmp_path / "mine.db").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_signals_reach_it_and_its_end_is_told(number: int, code: int) -> None:
    with serving(BASE_URL="http://127.0.0.1:1") as (_, process):
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        assert process.poll() == process.returncode == code
        process.kill()  # to nobody
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_another_beside_it_does_not_take_its_exit_code() -> None:
    processes = [Forked(["--version"], environment({})) for _ in range(3)]
    failed = Forked(["nonsense"], environment({}))
    assert [process.wait(PATIENCE) for process in (*processes, failed)] == [0, 0, 0, 2]
