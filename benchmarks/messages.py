"""What `POST …/messages` costs beside a plain send, and a file by URL beside curl."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import httpx

from benchmarks import load
from benchmarks.load import SEND_PATH
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import Command, PeerError, Server, free_port, running
from flowbridge.cli.demo.synapse import LocalSynapse

ROUNDS = 15
SECONDS = 1.0  # of a round: what a machine does beside changes from one ten seconds to the next
MESSAGES_PATH = SEND_PATH.replace("/send/m.room.message", "/messages")
MARKDOWN = (
    "**Build 4711** passed in *3:12*, see [the log](https://ci.example.org/build/4711).\n\n"
    "- 1,204 tests, `0` failed\n- coverage **91 %**\n- image `registry.example.org/app:4711`\n\n"
    "> deployed to staging by alice, waiting for approval from the operations team before it goes to production\n"
)
BODIES = {
    "a plain send": (SEND_PATH, load.MESSAGE),
    "a text": (MESSAGES_PATH, json.dumps({"text": "Build 4711 passed in 3:12"})),
    "Markdown of 300 bytes": (MESSAGES_PATH, json.dumps({"markdown": MARKDOWN})),
}
FILE_MB = 20
FILES = 9
ABOUT = f"""\
32 connections send messages to 64 rooms, each kind in turns of {SECONDS:g} s: `POST …/messages` with a text and with
Markdown, beside plain sends of the same bridge. Ratios are medians of those within a round. Then, on a real Synapse, a
file of {FILE_MB} MB that a message attaches by URL, beside curl, which downloads it and uploads it."""


def messages(run: Run) -> Section:
    """Rates beside that of plain sends; a file by URL beside curl."""
    rates, cpu, failures = _rates(run)
    rows, targets = [], []
    for name, each in rates.items():
        ratio = median(one / plain for one, plain in zip(each, rates["a plain send"], strict=True))
        rows.append([name, f"{median(each):,.0f}", f"{ratio:.2f}", f"{median(cpu[name]):,.0f}"])
        if name != "a plain send":
            least = 0.9 if name == "a text" else 0.75
            targets.append(Target(f"{name}: rate of a plain send's", ratio, least, at_least=True))
    ratio, grown = _file(run)
    rows.append([f"a file of {FILE_MB} MB by URL", "-", f"{ratio:.2f} of curl's time", "-"])
    targets += [
        Target(f"{FILE_MB} MB by URL: time of curl's", ratio, 1.3),
        Target(f"{FILE_MB} MB by URL: memory", grown, 8, " MB"),
    ]
    return Section(
        title="Messages",
        about=ABOUT,
        header=["what", "messages/s", "ratio", "CPU µs"],
        rows=rows,
        targets=targets,
        valid=not failures,
    )


def _rates(run: Run) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    rates: dict[str, list[float]] = {name: [] for name in BODIES}
    cpu: dict[str, list[float]] = {name: [] for name in BODIES}
    failures = 0
    with running(flowbridge_command(run.upstream.url), run.directory) as bridge:
        for path, body in BODIES.values():
            load.run(bridge.url + path, SECONDS, body=body)
        for number in range(1, ROUNDS + 1):
            for name, (path, body) in BODIES.items():
                before = bridge.cpu_seconds()
                found = load.run(bridge.url + path, SECONDS, body=body)
                rates[name].append(found.rate)
                cpu[name].append((bridge.cpu_seconds() - before) * 1e6 / max(1, found.requests))
                failures += found.failures
            say(
                f"  round {number}/{ROUNDS}  " + "   ".join(f"{name} {each[-1]:,.0f}/s" for name, each in rates.items())
            )
    return rates, cpu, failures


def _file(run: Run) -> tuple[float, float]:
    """The time of a message with a file by URL as a multiple of curl's, and by how many MB memory grew meanwhile."""
    folder = run.directory / "files"
    folder.mkdir()
    (folder / "file.bin").write_bytes(os.urandom(FILE_MB * 1_000_000))
    port = free_port()
    server = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    web = Command("files", server, port, "/")
    with LocalSynapse() as homeserver, running(web, run.directory) as files:
        token = homeserver.register("bench").access_token
        command = flowbridge_command(homeserver.url)
        command.environment["FLOWBRIDGE_FETCH_ALLOW"] = "127.0.0.1"
        with (
            running(command, run.directory) as bridge,
            httpx.Client(headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=60) as client,
        ):
            made = client.post(f"{homeserver.url}/_matrix/client/v3/createRoom", json={}).raise_for_status()
            url = f"{bridge.url}/rooms/{made.json()['room_id']}/messages"
            return _beside_curl(client, url, f"{files.url}/file.bin", bridge, homeserver.url, folder)


def _beside_curl(
    client: httpx.Client, url: str, file: str, bridge: Server, homeserver: str, folder: Path
) -> tuple[float, float]:
    upload = ["--data-binary", f"@{folder / 'copy.bin'}", "-H", f"Authorization: {client.headers['authorization']}"]
    pairs, grown = [], 0.0
    for number in range(FILES + 1):
        before = bridge.rss_mb()
        began = time.perf_counter()
        answer = client.post(url, json={"attachments": [{"url": file}]})
        ours = time.perf_counter() - began
        if answer.status_code != 200:
            raise PeerError(f"a message with a file is answered {answer.status_code}: {answer.text[:160]}")
        began = time.perf_counter()
        for arguments in (["-o", str(folder / "copy.bin"), file], [*upload, f"{homeserver}/_matrix/media/v3/upload"]):
            subprocess.run(["curl", "-sSf", *arguments], check=True, capture_output=True)
        curl = time.perf_counter() - began
        if number:  # what is made at the first is there from then on
            pairs.append((ours, curl))
            grown = max(grown, bridge.rss_mb() - before)
    ratio = median(ours / curl for ours, curl in pairs)
    say(f"  {FILE_MB} MB by URL: {ratio:.2f} of curl's time, memory {grown:+.1f} MB")
    return ratio, grown
