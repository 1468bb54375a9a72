"""The load: wrk with keep-alive connections that post one message repeatedly, into rooms in turn."""

import http.client
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.servers import PeerError

SCRIPT = Path(__file__).parent / "post.lua"
HOOKS_SCRIPT = Path(__file__).parent / "hooks.lua"
TOKEN = "syt_YmVuY2g_benchmarkbenchmarkbe_0aBcDe"
ROOMS = 64
SEND_PATH = "/rooms/%21room%3Aexample.org/send/m.room.message"
MESSAGE = json.dumps(
    {
        "msgtype": "m.text",
        "body": "Build 4711 passed in 3:12",
        "format": "org.matrix.custom.html",
        "formatted_body": "Build <b>4711</b> <i>passed</i> in 3:12",
    }
)


@dataclass(frozen=True)
class Load:
    """What one run of wrk saw; latencies in milliseconds."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    failures: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def arguments(seconds: float, connections: int = 32) -> list[str]:
    """wrk's own arguments, without script, URL and body."""
    return ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "--latency"]


def run(
    url: str,
    seconds: float,
    *,
    connections: int = 32,
    rooms: int = ROOMS,
    prefer: str = "",
    body: str = MESSAGE,
    token: str = TOKEN,
    tokens: int = 1,
) -> Load:
    """Post for that long; any status of 400 and above, socket error or timeout is a failure.

    `tokens`: so many, of which each has its number where "{n}" stands.
    """
    message = [body, token, str(rooms), str(tokens), *([prefer] if prefer else [])]
    return _run([*arguments(seconds, connections), "-s", str(SCRIPT), url, "--", *message])


def tell(url: str, seconds: float, *, connections: int = 32, hooks: int, body: str, headers: Sequence[str]) -> Load:
    """The same with requests to hooks; `url`: that of the first, without its number."""
    told = [body, str(hooks), *headers]
    return _run([*arguments(seconds, connections), "-s", str(HOOKS_SCRIPT), url, "--", *told])


def _run(command: Sequence[str]) -> Load:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"wrk ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:160]}")
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    return Load(
        requests=result["requests"],
        seconds=result["microseconds"] / 1e6,
        p50_ms=result["p50"] / 1e3,
        p99_ms=result["p99"] / 1e3,
        failures=result["failures"],
    )


def probe(url: str) -> None:
    """One message must be answered 200 before a load of them means anything."""
    status, text = post(url, MESSAGE, {"Authorization": f"Bearer {TOKEN}"})
    if status != 200:
        raise PeerError(f"answers a message with {status}: {text[:160]}")


def probe_guards(url: str) -> None:
    """A message without a body, or without a token, must be refused: else the figures hold no checks."""
    authorized = {"Authorization": f"Bearer {TOKEN}"}
    for what, body, headers in (("invalid", '{"msgtype": "m.text"}', authorized), ("tokenless", MESSAGE, {})):
        status, _ = post(url, body, headers)
        if not 400 <= status < 500:
            raise PeerError(f"answers {status} to an {what} message, which it should refuse")


def metric(url: str, name: str) -> float:
    """One figure of a bridge's /metrics."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=15)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))
    finally:
        connection.close()


def post(url: str, body: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text of one POST."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=15)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("POST", target, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
