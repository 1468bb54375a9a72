"""What encryption costs, beside plain messages of the same bridge: on real Synapse, and on an upstream at no cost."""

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

import httpx

from benchmarks import load, nginx
from benchmarks.devices import Keys, Member, ask, join, register
from benchmarks.peers import flowbridge_command
from benchmarks.report import Run, Section, Target, say
from benchmarks.servers import Command, PeerError, Server, running

if TYPE_CHECKING:
    from flowbridge.cli.demo.synapse import LocalSynapse

SECRET_KEY = "YmVuY2hiZW5jaGJlbmNoYmVuY2hiZW5jaGJlbmNoYmU="  # of a bridge that lives minutes on loopback
READY_SECONDS = 60.0
STARTS = 3
FIRSTS = 5  # rooms of which the first message is measured
FEW = (5, 4)  # users, and devices of each: 20 devices
MANY = (100, 5)
PAIRS = 200
ROUNDS = 5
ROOMS = 20
SENDERS = 8  # in one room
OTHERS = 8  # rooms beside the one with many devices
BESIDE_SECONDS = 20.0  # for which the others are measured, before and around that room's first message
HELD_ROOMS = 1_000
MESSAGES = 3  # in each of them
PATH = "/rooms/%21room{}{}%3Aexample.org/send/m.room.message"
PLAIN, SEALED = "", "-sealed"


def encryption(run: Run) -> Section:
    """Encrypted against plain, through one bridge."""
    real, fast = _real(run), _fast(run)
    return Section(
        title="Encryption",
        about=(
            "One bridge, in turns into plain rooms and encrypted ones. On real Synapse (SQLite, no limits): the first "
            f"message of {FIRSTS} rooms with {FEW[0]} users of {FEW[1]} devices each, none of which had a session yet; "
            f"{PAIRS} pairs of one message each; {ROUNDS} rounds of {run.seconds:g} s with {SENDERS} senders in one "
            f"room, and with one in each of {ROOMS} rooms; a room with {MANY[0]} users of {MANY[1]} devices, and what "
            f"{OTHERS} senders to other encrypted rooms reach in the {BESIDE_SECONDS:g} s before its first message, "
            "and meanwhile. On nginx, which answers at once: the bridge's own cost, and its memory with "
            f"{HELD_ROOMS:,} rooms of {FEW[0] * FEW[1]} devices that had {MESSAGES} messages each."
        ),
        header=["what", "plain", "encrypted", "ratio"],
        rows=[*real.rows, *fast.rows],
        targets=[*real.targets, *fast.targets],
    )


@dataclass
class _Part:
    rows: list[list[str]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def add(self, what: str, *figures: str, ratio: float | None = None) -> None:
        """`figures`: of plain messages, then of encrypted ones; of these alone where there is one."""
        shown = "" if ratio is None else f"{ratio:.2f}"
        say(f"  {what}: {' '.join(figures)} {shown}")
        self.rows.append([what, *([""] if len(figures) == 1 else []), *figures, shown])


# on real Synapse


def _real(run: Run) -> _Part:
    # Synapse is an extra: without it, the other benchmarks still run.
    from flowbridge.cli.demo.synapse import LocalSynapse

    part = _Part()
    with ExitStack() as stack:
        say("  starting Synapse")
        homeserver = stack.enter_context(LocalSynapse(rate_limits=False))
        world = _World(homeserver)
        command = _encrypting(homeserver.url, world.token)
        database = run.directory / "encryption.db"
        command.environment["FLOWBRIDGE_DATABASE_URL"] = f"sqlite:///{database}"
        with running(command, run.directory / _new(run, "first-start")) as bridge:
            _until_signed(bridge)  # it makes its device: not what a start takes
        starts = []
        for number in range(STARTS):
            began = time.perf_counter()
            with running(command, run.directory / _new(run, f"start-{number}")) as bridge:
                _until_signed(bridge)
                starts.append(time.perf_counter() - began)
        part.add("start until it can encrypt, s", f"{median(starts):.2f}")
        part.targets.append(Target("start until it can encrypt", median(starts), 3, " s"))
        bridge = stack.enter_context(running(command, run.directory / _new(run, "run")))
        _until_signed(bridge)
        rooms = _first_messages(world, bridge, part)
        _latency(world, bridge, rooms, part)
        _throughput(world, bridge, rooms, part, run.seconds)
        _many_devices(world, bridge, rooms, part)
    return part


class _World:
    """The bot on a real homeserver, its rooms, and who else is there."""

    def __init__(self, homeserver: "LocalSynapse") -> None:
        self.homeserver = homeserver
        self.bot = homeserver.register("bench")
        self.token = self.bot.access_token
        self._users = 0

    def members(self, users: int, devices: int) -> list[Member]:
        self._users += users
        names = [f"reader{number}" for number in range(self._users - users, self._users)]
        return register(self.homeserver, names, devices)

    def room(self, members: Sequence[Member], *, sealed: bool) -> str:
        encryption = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
        body = {"preset": "public_chat", "initial_state": [encryption] if sealed else []}
        with httpx.Client(trust_env=False, timeout=60) as client:
            room: str = ask(client, self.homeserver.url, self.token, "POST", "createRoom", body)["room_id"]
        join(self.homeserver, room, members)
        return room


def _first_messages(world: _World, bridge: Server, part: _Part) -> dict[bool, list[str]]:
    """Returns rooms by whether they are encrypted."""
    times: dict[bool, list[float]] = {False: [], True: []}
    rooms: dict[bool, list[str]] = {False: [], True: []}
    for _ in range(FIRSTS):
        members = world.members(*FEW)
        for sealed in (False, True):
            room = world.room(members, sealed=sealed)
            time.sleep(1.5)  # until the bridge has synced what it is not asked about
            times[sealed].append(_Sender(bridge.url, room, world.token).send())
            rooms[sealed].append(room)
    say("  " + ", ".join(f"{value:.2f} s" for value in times[True]))
    part.add(
        f"first message of a room with {FEW[0] * FEW[1]} devices, s",
        *(f"{median(each):.2f}" for each in times.values()),
    )
    part.targets.append(Target("first message of a room with 20 devices", median(times[True]), 0.5, " s"))
    for sealed, found in rooms.items():
        few = world.members(1, 4)
        found += [world.room(few, sealed=sealed) for _ in range(ROOMS - len(found))]
    return rooms


def _latency(world: _World, bridge: Server, rooms: dict[bool, list[str]], part: _Part) -> None:
    senders = {sealed: _Sender(bridge.url, found[0], world.token) for sealed, found in rooms.items()}
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(PAIRS // 10 + PAIRS):
        for sealed in random.sample([False, True], 2):
            elapsed = senders[sealed].send() * 1e3
            if number >= PAIRS // 10:
                times[sealed].append(elapsed)
    ratio = median(times[True]) / median(times[False])
    part.add("median ms of one message", *(f"{median(each):.1f}" for each in times.values()), ratio=ratio)
    part.add("p90 ms", *(f"{quantiles(each, n=10)[-1]:.1f}" for each in times.values()))
    part.targets.append(Target("latency of an encrypted message, against a plain one", ratio, 1.15))


def _throughput(world: _World, bridge: Server, rooms: dict[bool, list[str]], part: _Part, seconds: float) -> None:
    for what, limit, count, each_room in (("in one room", 0.6, 1, SENDERS), (f"over {ROOMS} rooms", 0.7, ROOMS, 1)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for sealed, found in rooms.items():
                with _Senders(bridge.url, world.token, found[:count] * each_room) as senders:
                    time.sleep(1.0)
                    rates[sealed].append(senders.rate(seconds))
        ratio = median(rates[True]) / median(rates[False])
        part.add(f"messages/s {what}", *(f"{median(each):.0f}" for each in rates.values()), ratio=ratio)
        name = f"encrypted messages {what}, against plain ones"
        part.targets.append(Target(name, ratio, limit, at_least=True))


def _many_devices(world: _World, bridge: Server, rooms: dict[bool, list[str]], part: _Part) -> None:
    say(f"  {MANY[0] * MANY[1]} devices")
    members = world.members(*MANY)
    room = world.room(members, sealed=True)
    time.sleep(5.0)  # until the bridge's syncs have told it of the room
    with _Senders(bridge.url, world.token, rooms[True][:OTHERS]) as senders:
        senders.rate(2.0)
        before = senders.rate(BESIDE_SECONDS)
        first = _Once(lambda: _Sender(bridge.url, room, world.token).send())
        beside = senders.rate(BESIDE_SECONDS)
        seconds = first.result()
        # Of the time that it took, not of all that was measured: else a short one would not be seen.
        during = senders.share
    quiet = before or 1.0
    share = during(first.began, first.ended) / quiet
    part.add(f"first message of a room with {MANY[0] * MANY[1]} devices, s", f"{seconds:.2f}")
    part.add(
        "messages/s of other encrypted rooms, before and meanwhile",
        f"{before:.0f}",
        f"{share * quiet:.0f}",
        ratio=share,
    )
    part.add(f"the same over {BESIDE_SECONDS:g} s around it", f"{before:.0f}", f"{beside:.0f}", ratio=beside / quiet)
    part.targets.append(Target("first message of a room with 500 devices", seconds, 10, " s"))
    part.targets.append(Target("rate of other rooms meanwhile", share, 0.8, at_least=True))


class _Sender:
    """Sends one message after another into one room."""

    def __init__(self, url: str, room: str, token: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self._path = f"/rooms/{quote(room, safe='')}/send/m.room.message"
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def send(self) -> float:
        """Seconds until the answer is read."""
        began = time.perf_counter()
        self._connection.request("POST", self._path, load.MESSAGE, self._headers)
        answer = json.loads(self._connection.getresponse().read())
        elapsed = time.perf_counter() - began
        if "event_id" not in answer:
            raise PeerError(f"a message was answered {answer}")
        return elapsed

    def close(self) -> None:
        self._connection.close()


class _Senders:
    """One for each of these rooms, as fast as the answers come."""

    def __init__(self, url: str, token: str, rooms: Sequence[str]) -> None:
        self._senders = [_Sender(url, room, token) for room in rooms]
        self._ends = threading.Event()
        self._times: list[float] = []
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(each,), daemon=True) for each in self._senders]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _run(self, sender: _Sender) -> None:
        try:
            while not self._ends.is_set():
                sender.send()
                self._times.append(time.perf_counter())
        except Exception as error:
            self._errors.append(error)
        finally:
            sender.close()

    def rate(self, seconds: float) -> float:
        """Answers a second from now on."""
        began = time.perf_counter()
        time.sleep(seconds)
        return self.share(began, time.perf_counter())

    def share(self, began: float, ended: float) -> float:
        """Answers a second between these times."""
        return sum(began <= at < ended for at in self._times) / (ended - began)


class _Once:
    """Something that is done in a thread."""

    def __init__(self, do: Callable[[], float]) -> None:
        self.began = time.perf_counter()
        self.ended = 0.0
        self._found: float | Exception = 0.0
        self._thread = threading.Thread(target=self._run, args=(do,), daemon=True)
        self._thread.start()

    def _run(self, do: Callable[[], float]) -> None:
        try:
            self._found = do()
        except Exception as error:
            self._found = error
        self.ended = time.perf_counter()

    def result(self) -> float:
        self._thread.join()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


# on nginx


def _fast(run: Run) -> _Part:
    part = _Part()
    keys = [Keys("@reader:example.org", f"DEVICE{number}") for number in range(FEW[0] * FEW[1])]
    published = {"device_keys": {"@reader:example.org": {each.device_id: each.published for each in keys}}}
    claimed = {"one_time_keys": {"@reader:example.org": {each.device_id: each.one_time for each in keys}}}
    with running(nginx.sealing_homeserver(run.directory, published, claimed), run.directory) as homeserver:
        with running(_encrypting(homeserver.url, load.TOKEN), run.directory) as bridge:
            _until_held(bridge)
            for rooms in (1, ROOMS):
                _cost(bridge, rooms, part, run.seconds)
        memory = {}
        for kind in (PLAIN, SEALED):
            with running(_encrypting(homeserver.url, load.TOKEN), run.directory) as bridge:
                _until_held(bridge)
                _fill(bridge, kind)
                memory[kind] = bridge.rss_mb()
    more = memory[SEALED] - memory[PLAIN]
    part.add(f"memory with {HELD_ROOMS:,} rooms, MB", *(f"{each:.1f}" for each in memory.values()))
    part.targets.append(Target("memory of 1,000 encrypted rooms above as many plain ones", more, 60, " MB"))
    return part


def _cost(bridge: Server, rooms: int, part: _Part, seconds: float) -> None:
    rates: dict[str, list[float]] = {PLAIN: [], SEALED: []}
    cpu: dict[str, list[float]] = {PLAIN: [], SEALED: []}
    for number in range(ROUNDS + 1):
        for kind in (PLAIN, SEALED):
            used = bridge.cpu_seconds()
            done = load.run(bridge.url + PATH.format("", kind), seconds, rooms=rooms)
            if done.failures:
                raise PeerError(f"{done.failures} of {done.requests} messages failed: {bridge.condition}")
            if number:  # the first round warms up
                rates[kind].append(done.rate)
                cpu[kind].append((bridge.cpu_seconds() - used) * 1e6 / done.requests)
    where = "one room" if rooms == 1 else f"{rooms} rooms"
    for what, found in ((f"on nginx, {where}: messages/s", rates), (f"on nginx, {where}: processor µs each", cpu)):
        ratio = median(found[SEALED]) / median(found[PLAIN])
        part.add(what, *(f"{median(each):,.0f}" for each in found.values()), ratio=ratio)


def _fill(bridge: Server, kind: str) -> None:
    """So many rooms, each with some messages, several at a time."""
    numbers = iter([number for _ in range(MESSAGES) for number in range(HELD_ROOMS)])
    lock = threading.Lock()
    failed: list[str] = []

    def send() -> None:
        headers = {"Authorization": f"Bearer {load.TOKEN}"}
        while not failed:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                status, text = load.post(bridge.url + PATH.format(number, kind), load.MESSAGE, headers)
            except OSError as error:
                status, text = 0, str(error)
            if status != 200:
                failed.append(f"{status}: {text[:160]}")

    threads = [threading.Thread(target=send) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise PeerError(f"a message was answered {failed[0]}")


# bridges


def _encrypting(homeserver_url: str, token: str) -> Command:
    command = flowbridge_command(homeserver_url)
    settings = {
        "ACCESS_TOKEN": token,
        "FLOWBRIDGE_ENCRYPTED_ROOMS": "encrypt",
        "FLOWBRIDGE_SECRET_KEY": SECRET_KEY,
    }
    return replace(command, environment=command.environment | settings)


def _new(run: Run, name: str) -> str:
    (run.directory / name).mkdir()
    return name


def _until_signed(bridge: Server) -> None:
    _until(bridge, lambda standing: standing == "signed")


def _until_held(bridge: Server) -> None:
    """The static homeserver does not have the device's keys; the bridge encrypts all the same."""
    _until(bridge, lambda standing: standing in ("signed", "unsigned", "absent", "foreign"))


def _until(bridge: Server, holds: Callable[[Any], bool]) -> None:
    ends, told = time.monotonic() + READY_SECONDS, None
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < ends:
            told = client.get(f"{bridge.url}/readyz").json()
            if holds(told.get("checks", told).get("encryption")):
                return
            time.sleep(0.05)
    raise PeerError(f"its device is not at work: {told}")
