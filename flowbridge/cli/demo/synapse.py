"""A real Synapse on a loopback port, in a temporary directory, for the demo, the tests and the benchmarks."""

import base64
import hashlib
import hmac
import importlib.util
import json
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Any, Self

import httpx

START_SECONDS = 180  # it takes five, and far more on a busy machine
STOP_SECONDS = 10
TRIES_FOR_A_PORT = 5

# The child ends, and removes its directory, when the pipe on its stdin is closed: a pipe closes with its
# writer even after kill -9, on every system, and unlike PR_SET_PDEATHSIG does not depend on the starting thread.
_RUN_WHILE_PARENT_LIVES = """
import os, shutil, sys, threading
def end_with_parent(directory):
    os.read(0, 1)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
threading.Thread(target=end_with_parent, args=(sys.argv.pop(1),), daemon=True).start()
from synapse.app.homeserver import main
main()
"""


class SynapseError(RuntimeError):
    """The local Synapse failed; the message says why, for people to read."""


class _PortTakenError(SynapseError):
    """Another process took the port before Synapse did."""


@dataclass(frozen=True)
class Account:
    """A user of the local Synapse, logged in on one device."""

    user_id: str
    access_token: str = field(repr=False)
    device_id: str
    password: str = field(repr=False)


class LocalSynapse:
    """A Synapse process: `with LocalSynapse() as hs: hs.url`.

    `rate_limits=True` keeps Synapse's default limits, False lifts them all; keys of `config` replace whole
    top-level keys of homeserver.yaml. Entering raises SynapseError, with the end of the log, when Synapse
    is not installed or does not answer within 180 s. Leaving stops it and removes its directory.
    """

    def __init__(
        self,
        *,
        rate_limits: bool = False,
        server_name: str = "localhost",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.server_name = server_name
        self._rate_limits = rate_limits
        self._extra = dict(config or {})
        self._secret = secrets.token_hex(32)
        self._signing_key = _new_signing_key()
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if importlib.util.find_spec("synapse") is None:
            raise SynapseError("This needs Synapse, which is not installed: pip install 'flowbridge[demo]'")
        self._temporary = TemporaryDirectory(prefix="flowbridge-synapse-")
        self._http = httpx.Client(trust_env=False, timeout=START_SECONDS)
        try:
            self._start_on_a_free_port()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()

    @property
    def url(self) -> str:
        """The client API's address, `http://127.0.0.1:PORT`; the same for the object's whole life."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def directory(self) -> Path:
        """Where the configuration, the database, the media and the log are."""
        return Path(self._temporary.name)

    @property
    def pid(self) -> int | None:
        """Synapse's process, to measure it; None while it is stopped."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Run Synapse on its port and data, and return when it answers; does nothing while it runs."""
        if self._process is not None:
            return
        with (self.directory / "homeserver.log").open("ab") as log:
            self._process = _launch(self.directory, log)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop Synapse and keep its data; it is killed when it has not stopped after 10 s."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            if process.stdin:
                process.stdin.close()

    def register(
        self,
        name: str,
        password: str = "wordpass",  # noqa: S107 - the guide's example, for a server that lives minutes on loopback
        *,
        admin: bool = False,
    ) -> Account:
        """Register and log in `@name:server_name`. Raises SynapseError with the homeserver's reason.

        The shared-secret API has no rate limits, and can register administrators.
        """
        nonce = self._answer(self._http.get(f"{self.url}/_synapse/admin/v1/register"))["nonce"]
        parts = [nonce, name, password, "admin" if admin else "notadmin"]
        mac = hmac.new(self._secret.encode(), "\0".join(parts).encode(), hashlib.sha1).hexdigest()
        body = {"nonce": nonce, "username": name, "password": password, "admin": admin, "mac": mac}
        made = self._answer(self._http.post(f"{self.url}/_synapse/admin/v1/register", json=body))
        return Account(made["user_id"], made["access_token"], made["device_id"], password)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of what Synapse printed and logged."""
        with suppress(FileNotFoundError):
            text = (self.directory / "homeserver.log").read_text(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    def _start_on_a_free_port(self) -> None:
        for remaining in reversed(range(TRIES_FOR_A_PORT)):
            self._port = _free_port()
            self._write_configuration()
            try:
                self.start()
            except _PortTakenError:
                if not remaining:
                    raise
            else:
                return

    def _write_configuration(self) -> None:
        """homeserver.yaml and log.yaml, in JSON, which is YAML too."""
        limits = {} if self._rate_limits else _no_rate_limits()
        settings = self._settings() | limits | self._extra
        (self.directory / "homeserver.yaml").write_text(json.dumps(settings, indent=2))
        (self.directory / "log.yaml").write_text(json.dumps(_LOG_SETTINGS, indent=2))

    def _settings(self) -> dict[str, Any]:
        listener = {
            "port": self._port,
            "bind_addresses": ["127.0.0.1"],
            "type": "http",
            "resources": [{"names": ["client"]}],
        }
        return {
            "server_name": self.server_name,
            "public_baseurl": f"{self.url}/",
            "listeners": [listener],
            "database": {"name": "sqlite3", "args": {"database": str(self.directory / "homeserver.db")}},
            "media_store_path": str(self.directory / "media"),
            "log_config": str(self.directory / "log.yaml"),
            "signing_key": self._signing_key,
            "registration_shared_secret": self._secret,
            "macaroon_secret_key": self._secret,
            "form_secret": self._secret,
            "enable_registration": True,
            "enable_registration_without_verification": True,
            "bcrypt_rounds": 4,
            "federation_domain_whitelist": [],
            "trusted_key_servers": [],
            "suppress_key_server_warning": True,
            "report_stats": False,
            "stats": {"enabled": False},
            "presence": {"enabled": False},
            "url_preview_enabled": False,
        }

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self._failure(f"ended with exit code {process.returncode}")
            with suppress(httpx.TransportError):
                if self._http.get(f"{self.url}/_matrix/client/versions", timeout=2).is_success:
                    return
            time.sleep(0.05)
        raise self._failure(f"did not answer within {START_SECONDS} s")

    def _failure(self, what: str) -> SynapseError:
        tail = self.log_tail()
        kind = _PortTakenError if "Address already in use" in tail else SynapseError
        return kind(f"The local Synapse {what}. The end of its log:\n{tail or '(empty)'}")

    @staticmethod
    def _answer(response: httpx.Response) -> dict[str, Any]:
        if not response.is_success:
            raise SynapseError(f"The local Synapse answered {response.status_code}: {response.text}")
        answer: dict[str, Any] = response.json()
        return answer

    def _clean_up(self) -> None:
        try:
            self.stop()
        finally:
            self._http.close()
            self._temporary.cleanup()


def _launch(directory: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C in a terminal reaches only us, and we stop it in order."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter, no shell, no argument from outside
        [sys.executable, "-c", _RUN_WHILE_PARENT_LIVES, str(directory), "-c", "homeserver.yaml"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _free_port() -> int:
    """A free port below the range of outgoing connections, so that none takes it while Synapse is stopped."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SynapseError("No free port was found on 127.0.0.1 between 20000 and 30000.")


def _new_signing_key() -> str:
    """One line in the format of signedjson: algorithm, version, 32 random bytes in unpadded base64."""
    return f"ed25519 a_local {base64.b64encode(secrets.token_bytes(32)).decode().rstrip('=')}"


def _no_rate_limits() -> dict[str, Any]:
    lifted = {"per_second": 1_000_000, "burst_count": 1_000_000}
    flat = ["message", "registration", "registration_token_validity", "admin_redaction", "joins_per_room"]
    flat += ["3pid_validation", "third_party_invite", "media_create", "delayed_event_mgmt", "room_creation"]
    flat += ["key_requests", "reports", "user_directory", "profile"]
    nested = {
        "login": ["address", "account", "failed_attempts"],
        "joins": ["local", "remote"],
        "invites": ["per_room", "per_user", "per_issuer"],
        "presence": ["per_user"],
    }
    limits: dict[str, Any] = {f"rc_{name}": lifted for name in flat}
    return limits | {f"rc_{name}": dict.fromkeys(parts, lifted) for name, parts in nested.items()}


# Only warnings: a line per request would slow down what the benchmarks measure.
_LOG_SETTINGS = {
    "version": 1,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "WARNING", "handlers": ["stderr"]},
    "disable_existing_loggers": False,
}
