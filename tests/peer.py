"""Another client in encrypted rooms: matrix-js-sdk with its Rust crypto, in strict mode, as a process of Node's."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flowbridge.cli.demo.synapse import Account
from tests import node
from tests.patience import PATIENCE

FOLDER = Path(__file__).parent / "clients" / "js"


class PeerError(AssertionError):
    """The client could not do it, and says why."""


class Peer:
    """`with Peer(url, account) as peer: peer.join(room)`. `strict`: only cross-signed devices count for it."""

    def __init__(self, url: str, account: Account, *, strict: bool = True, signed: bool = True) -> None:
        node.installed(FOLDER, "matrix-js-sdk")
        self._environment = {
            "HOMESERVER": url,
            "NAME": account.user_id,
            "PASSWORD": account.password,
            "STRICT": str(int(strict)),
            "SIGNED": str(int(signed)),
        }

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [str(node.PROGRAMS / "node"), "peer.mjs"],
            cwd=FOLDER,
            env=node.environment(**self._environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self.me = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, do: str, **rest: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **rest}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def read(self, event_id: str, *, patience: float = PATIENCE) -> dict[str, Any]:
        """The event as the client shows it; after so long without its key, as it stands."""
        return self.ask("read", event_id=event_id, patience=patience)

    def send(self, room: str, content: dict[str, Any]) -> str:
        return str(self.ask("send", room=room, content=content)["event_id"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise PeerError(f"the client ended: {self._process.stderr.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        found: dict[str, Any] = answer["ok"]
        return found

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes, too
