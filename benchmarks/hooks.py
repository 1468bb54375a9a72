"""What a request to a hook costs beside a plain send."""

import hashlib
import hmac
import json
from statistics import median
from typing import Any

from benchmarks import load
from benchmarks.load import SEND_PATH, TOKEN
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import REPOSITORY, PeerError, running

HOOKS = 64  # each into a room of its own, as the plain sends
PUSH = REPOSITORY / "tests" / "payloads" / "github" / "push-new-branch.json"

ROUNDS = 9
SECONDS = 1.0  # of a round: what a machine does beside changes from one ten seconds to the next
PLAIN = "a plain send"
SECRET = "fh_benchmark-benchmark-benchmark-benchmark"
Json = dict[str, Any]

LEAST = {"one alert": 0.6, "five alerts": 0.45, "a push": 0.6}
ABOUT = f"""\
32 connections tell 64 hooks what has happened, each kind in turns of {SECONDS:g} s, beside plain sends of the same
bridge to 64 rooms: Alertmanager's body with one alert and with five, by bearer token, and GitHub's push with its
signature. Each body is another one, as those of their senders are: a body that comes again within a minute is not
rendered anew. Ratios are medians of those within a round."""


def alerts(number: int) -> Json:
    """Alertmanager's body, with {n} where it differs from the next one."""
    one = {
        "status": "firing",
        "labels": {"alertname": "HighLatency", "instance": "web-{n}:9100", "severity": "critical", "job": "node"},
        "annotations": {
            "summary": "p99 latency of {n} is 2.3 s",
            "description": "More than 1 s for 5 minutes, see the runbook",
            "runbook_url": "https://runbooks.example.org/latency",
        },
        "startsAt": "2026-11-22T10:00:00.000Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus.example.org:9090/graph?g0.expr=latency",
        "fingerprint": "{n}",
    }
    each = [{**one, "fingerprint": f"{{n}}-{at}"} for at in range(number)]
    return {
        "version": "4",
        "groupKey": '{}:{alertname="HighLatency", n="{n}"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "matrix",
        "groupLabels": {"alertname": "HighLatency"},
        "commonLabels": {"alertname": "HighLatency", "severity": "critical"},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager.example.org:9093",
        "alerts": each,
    }


def bodies() -> dict[str, tuple[str, list[str]]]:
    """What is told, and with which headers."""
    bearer = [f"Authorization: Bearer {SECRET}{{hook}}"]
    push = json.dumps(json.loads(PUSH.read_text()), separators=(",", ":"))
    made = hmac.new(SECRET.encode(), push.encode(), hashlib.sha256).hexdigest()
    github = ["X-GitHub-Event: push", "X-GitHub-Delivery: {n}", f"X-Hub-Signature-256: sha256={made}"]
    return {
        "one alert": (json.dumps(alerts(1)), bearer),
        "five alerts": (json.dumps(alerts(5)), bearer),
        "a push": (push, github),
    }


def hooks_file() -> str:
    """JSON is YAML."""
    found: list[Json] = []
    for number in range(HOOKS):
        room = f"!room{number}:example.org"
        found.append({"name": f"alerthook{number}", "room": room, "verification": {"secret": f"{SECRET}{number}"}})
        signed = {"scheme": "github", "secret": SECRET}
        found.append({"name": f"pushhook{number}", "room": room, "verification": signed})
    return json.dumps(found)


def hooks(run: Run) -> Section:
    """Rates beside that of plain sends."""
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    failures = 0
    file = run.directory / "hooks.yaml"
    file.write_text(hooks_file())
    command = flowbridge_command(run.upstream.url)
    command.environment.update(FLOWBRIDGE_HOOKS_FILE=str(file), ACCESS_TOKEN=TOKEN)
    with running(command, run.directory) as bridge:

        def one(name: str) -> load.Load:
            if name == PLAIN:
                return load.run(bridge.url + SEND_PATH, SECONDS)
            body, headers = told[name]
            kind = "push" if name == "a push" else "alert"
            return load.tell(f"{bridge.url}/hooks/{kind}hook", SECONDS, hooks=HOOKS, body=body, headers=headers)

        told = bodies()
        names = [PLAIN, *told]
        for name in names:
            one(name)
        for number in range(1, ROUNDS + 1):
            for name in names:
                before = bridge.cpu_seconds()
                found = one(name)
                rates.setdefault(name, []).append(found.rate)
                cpu.setdefault(name, []).append((bridge.cpu_seconds() - before) * 1e6 / max(1, found.requests))
                failures += found.failures
            shown = "   ".join(f"{name} {each[-1]:,.0f}/s" for name, each in rates.items())
            say(f"  round {number}/{ROUNDS}  {shown}")
    if not all(rates.values()):
        raise PeerError("nothing was answered")
    rows, targets = [], []
    for name, each in rates.items():
        ratio = median(one / plain for one, plain in zip(each, rates[PLAIN], strict=True))
        rows.append([name, f"{median(each):,.0f}", f"{ratio:.2f}", f"{median(cpu[name]):,.0f}"])
        if name != PLAIN:
            targets.append(Target(f"hooks, {name}: rate of a plain send's", ratio, LEAST[name], at_least=True))
    return Section(
        title="Hooks",
        about=ABOUT,
        header=["what", "requests/s", "ratio", "CPU µs"],
        rows=rows,
        targets=targets,
        valid=not failures,
    )
