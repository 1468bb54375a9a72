"""Debian's Alertmanager on loopback, which tells a hook: a single one, or members of an HA pair."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from tests.node import missing
from tests.patience import PATIENCE, until
from tests.processes import free_port

# `group_wait`: alerts that are told together are heard of one by one. Where they began longer ago than this, on a busy
# machine, the first of them is sent at once (aggrGroup.insert), and the others are news that another message tells.
CONFIG = """
route:
  receiver: flowbridge
  group_by: [alertname]
  group_wait: 3s
  group_interval: 500ms
  repeat_interval: 2s
receivers:
  - name: flowbridge
    webhook_configs:
      - url: %(url)s
        http_config: {authorization: {credentials: %(secret)s}}
"""


@dataclass(frozen=True)
class Alertmanagers:
    """Each is told of each alert at the same time, as Prometheus does it."""

    urls: Sequence[str]
    processes: "Sequence[subprocess.Popen[bytes]]"

    def check(self) -> None:
        """What there is to wait for comes from them."""
        assert [process.poll() for process in self.processes] == [None] * len(self.urls), "an Alertmanager has ended"

    def fires(self, *instances: str) -> None:
        now = datetime.now(UTC)
        self._tell(instances, {"startsAt": now.isoformat(), "endsAt": (now + timedelta(minutes=4)).isoformat()})

    def resolves(self, *instances: str) -> None:
        self._tell(instances, {"endsAt": datetime.now(UTC).isoformat()})

    def repeat(self, times: int = 3) -> None:
        """Wait until they have told the hook so many times more."""
        wanted = self.requests() + times
        until(lambda: self.requests() >= wanted, 5 * PATIENCE)

    def requests(self) -> int:
        """How often they have told the hook, or tried to."""
        return sum(int(float(value)) for url in self.urls for value in _REQUESTS.findall(_metrics(url)))

    def _tell(self, instances: Sequence[str], more: dict[str, str]) -> None:
        alerts = [
            {
                "labels": {"alertname": "HostDown", "instance": name},
                "annotations": {"summary": f"{name} is down"},
                **more,
            }
            for name in instances
        ]
        for url in self.urls:
            httpx.post(f"{url}/api/v2/alerts", json=alerts, trust_env=False).raise_for_status()


_REQUESTS = re.compile(r'^alertmanager_notification_requests_total\{integration="webhook"\} (\S+)$', re.MULTILINE)


def _metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", trust_env=False).text


@contextmanager
def alertmanagers(number: int, url: str, secret: str, folder: Path, *, gossips: bool = True) -> Iterator[Alertmanagers]:
    """So many members. None waits for another one to tell the hook first.

    `gossips`: else none knows what another has told already, as when the network between them is cut.
    """
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program is None:
        missing(
            "Alertmanager is not installed (Debian's prometheus-alertmanager), so that it is NOT TESTED as a sender"
        )
    assert program
    config = folder / "alertmanager.yml"
    config.write_text(CONFIG % {"url": url, "secret": secret})
    peers = [f"127.0.0.1:{free_port()}" for _ in range(number)]
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(number)]
    processes = []
    with ExitStack() as stack:
        for at, own in enumerate(urls):
            gossip = [f"--cluster.listen-address={peers[at]}", f"--cluster.advertise-address={peers[at]}"]
            gossip += [f"--cluster.peer={peer}" for peer in peers if peer != peers[at]]
            gossip += ["--cluster.settle-timeout=1s", "--cluster.peer-timeout=0s", "--cluster.gossip-interval=50ms"]
            options = gossip if gossips and number > 1 else ["--cluster.listen-address="]
            store = f"--storage.path={folder / f'alertmanager-{at}'}"
            command = [
                program,
                f"--config.file={config}",
                store,
                f"--web.listen-address={own[len('http://') :]}",
                *options,
            ]
            processes.append(stack.enter_context(_running(command, own, folder / f"alertmanager-{at}.log")))
        yield Alertmanagers(urls, processes)


@contextmanager
def _running(command: Sequence[str], url: str, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={"PATH": os.environ["PATH"]})
    try:
        until(lambda: _is_ready(url, process, log))
        yield process
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        time.sleep(0.05)
        return False
