"""A homeserver that does what a test tells it to: for the faults that a real one does not show when asked.

A script is a function from a request to a behaviour, and a behaviour does something to the connection that the
request came on. Where a script gives None, the upstream answers as a healthy homeserver does. The judge's homeserver
(`tests/chaos/faulty_homeserver.py`) is an upstream with a script of chance faults.
"""

import contextlib
import hashlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.chaos import rooms
from tests.patience import PATIENCE as PATIENCE


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came. `connection`: the number of the connection that it came on, from 1; `port`: where to."""

    connection: int
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    port: int

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def parts(self) -> list[str]:
        """The segments of the path, decoded."""
        return [unquote(part) for part in self.path.split("/")[1:]]

    @property
    def token(self) -> str:
        return self.header("authorization").partition(" ")[2]

    def query(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.target).query).get(name, [None])[0]

    def header(self, name: str) -> str:
        """All values of a header, joined by commas."""
        return ", ".join(value for key, value in self.headers if key == name.lower())

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection to the upstream, for a behaviour to write on."""

    def __init__(self, sock: socket.socket, number: int, stopping: threading.Event) -> None:
        self.number = number
        self.stopping = stopping
        self._socket = sock
        self._port: int = sock.getsockname()[1]
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def wait_until_closed(self) -> None:
        """Say nothing until the other side hangs up."""
        while self._socket.recv(65_536):
            pass

    def close(self) -> None:
        """End it now; a thread that reads from it notices."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def request(self) -> Request | None:
        """The next request; None at the end of the connection."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._fill():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        headers = tuple((name.lower(), value.strip()) for name, _, value in pairs)
        if dict(headers).get("transfer-encoding") == "chunked":
            body = self._chunks()
        else:
            body = self._read(int(dict(headers).get("content-length", "0")))
        return None if body is None else Request(self.number, method, target, headers, body, self._port)

    def _read(self, length: int) -> bytes | None:
        while len(self._buffer) < length:
            if not self._fill():
                return None
        found, self._buffer = self._buffer[:length], self._buffer[length:]
        return found

    def _chunks(self) -> bytes | None:
        body = b""
        while True:
            while b"\r\n" not in self._buffer:
                if not self._fill():
                    return None
            size, _, self._buffer = self._buffer.partition(b"\r\n")
            chunk = self._read(int(size, 16) + 2)
            if chunk is None or len(chunk) == 2:
                return None if chunk is None else body
            body += chunk[:-2]

    def _fill(self) -> bool:
        data = self._socket.recv(65_536)
        self._buffer += data
        return bool(data)


Behaviour = Callable[[Connection], None]
Script = Callable[[Request], Behaviour | None]


class Upstream:
    """A scripted HTTP server on loopback, with a thread for each connection. `keep=False`: it forgets the requests.

    `ports`: where it listens; 0: any free port.
    """

    def __init__(
        self,
        script: Script | None = None,
        tls: ssl.SSLContext | None = None,
        *,
        ports: Sequence[int] = (0,),
        keep: bool = True,
    ) -> None:
        self._script = script
        self._tls = tls
        self._keep = keep
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._requests: list[Request] = []
        self._open: dict[int, Connection] = {}
        self._accepted = 0
        self._threads: list[threading.Thread] = []
        self._listeners = [_listen(port) for port in ports]
        self.ports: list[int] = [listener.getsockname()[1] for listener in self._listeners]

    def __enter__(self) -> Self:
        self._accept_on_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.refuse()
        with self._changed:
            threads, connections = list(self._threads), list(self._open.values())
        for connection in connections:
            connection.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a behaviour of the scripted upstream does not end"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def requests(self) -> list[Request]:
        """All requests that came, in order."""
        with self._changed:
            return list(self._requests)

    @property
    def events(self) -> list[Request]:
        """The requests that would put something into a room."""
        with self._changed:
            return self._events()

    @property
    def accepted(self) -> int:
        """How many connections were made."""
        with self._changed:
            return self._accepted

    def script(self, script: Script | None) -> None:
        """Do this from now on."""
        self._script = script

    def always(self, behaviour: Behaviour, *, at: str = "") -> None:
        """Do this from now on for every request whose target holds `at`."""
        self._script = lambda request: behaviour if at in request.target else None

    def reset(self) -> None:
        """In good health, with no memory of requests."""
        with self._changed:
            self._script = None
            self._requests.clear()

    def refuse(self) -> None:
        """Accept no more connections."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # it does so already
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def listen(self) -> None:
        """Accept connections again, on the same ports."""
        self._listeners = [_listen(port) for port in self.ports]
        self._accept_on_all()

    def drop(self) -> None:
        """Hang up on every client."""
        with self._changed:
            connections = list(self._open.values())
        for connection in connections:
            connection.close()

    def go_away(self, seconds: float) -> None:
        """Be gone for this long, in a thread of its own."""
        self._start(self._be_away, seconds)

    def wait_for_requests(self, number: int) -> list[Request]:
        """Until this many have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._requests) >= number, PATIENCE), self._requests
            return list(self._requests)

    def wait_for_events(self, number: int) -> list[Request]:
        """Until this many have come that would put something into a room."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._events()) >= number, PATIENCE), self._requests
            return self._events()

    def wait_for_open(self, number: int) -> None:
        """Until exactly this many connections are open."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._open) == number, PATIENCE), self._open

    def _events(self) -> list[Request]:
        return [request for request in self._requests if request.method != "GET"]

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=self._run, args=(target, *args), daemon=True)
        with self._changed:
            self._threads.append(thread)
        thread.start()

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        target(*args)
        with self._changed:
            self._threads.remove(threading.current_thread())

    def _be_away(self, seconds: float) -> None:
        self.refuse()
        self.drop()
        if not self._stopping.wait(seconds):
            self.listen()

    def _accept_on_all(self) -> None:
        for listener in self._listeners:
            self._start(self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self._changed:
                self._accepted += 1
                number = self._accepted
            self._start(self._serve, sock, number)

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
        except OSError:  # ssl.SSLError is one: the other side does not trust the certificate
            sock.close()
            return
        connection = Connection(sock, number, self._stopping)
        with self._changed:
            self._open[number] = connection
            self._changed.notify_all()
        try:
            while (request := connection.request()) is not None:
                with self._changed:  # a test that has waited for the request may set another script, not meant for it
                    if self._keep:
                        self._requests.append(request)
                    behaviour = self._script(request) if self._script else None
                    self._changed.notify_all()
                (behaviour or healthy(request))(connection)
        except OSError:
            pass  # the connection ended, from either side
        finally:
            connection.close()
            with self._changed:
                del self._open[number]
                self._changed.notify_all()


def _listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=1024)


def user_of(token: str) -> str:
    """The user with this token: a different one for each token, so that callers do not get in each other's way."""
    return f"@{hashlib.sha256(token.encode()).hexdigest()[:12]}:upstream"


def healthy(request: Request) -> Behaviour:
    """What a homeserver would answer."""
    path = request.path
    if path.endswith("/account/whoami"):
        return answer({"user_id": user_of(request.token), "device_id": "DEVICE"})
    if path.endswith("/versions"):
        return answer({"versions": ["v1.11"]})
    if "/join/" in path:
        return answer({"room_id": "!joined:upstream"})
    if request.method == "PUT":
        return answer({"event_id": "$event"})
    if "/state/m.room.encryption" in path:
        return matrix_error(404, "M_NOT_FOUND", "Event not found.")  # as in a room that is not encrypted
    if "/state/m.room.member/" in path:
        return answer({"membership": "join"})
    if "/state/" in path:
        return answer({"name": "the state"})
    return matrix_error(404, "M_UNRECOGNIZED", "Unrecognized request")


class Rooms(rooms.Rooms):
    """A script: a homeserver that keeps what it is sent, and recognises a transaction id (by user and room)."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def __call__(self, request: Request) -> Behaviour | None:
        by = rooms.Device(user_of(request.token), "DEVICE")
        with self._changed:
            match (request.method, *request.parts[3:]):
                case ("PUT", "rooms", room, "send", type_, txn_id):
                    event_id = self.send(by, room, type_, txn_id, request.json())
                case ("PUT", "rooms", room, "redact", _, txn_id):
                    event_id = self.send(by, room, "m.room.redaction", txn_id, request.json())
                case ("PUT", "rooms", room, "state", type_, *key):
                    event_id = self.put_state(by, room, type_, "".join(key), request.json())
                case _:
                    return None
            self._changed.notify_all()
        return answer({"event_id": event_id})

    @property
    def bodies(self) -> list[Any]:
        """What the messages say, in order."""
        with self._changed:
            return [event.content.get("body") for event in self.events]

    def wait_for(self, number: int) -> list[rooms.Event]:
        """Until there are this many events."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= number, PATIENCE), self.events
            return list(self.events)


def encoded(status: int, body: bytes, *headers: str) -> bytes:
    """An answer as it goes over the wire."""
    lines = [f"HTTP/1.1 {status} Scripted", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def answer(value: Any, status: int = 200, *headers: str) -> Behaviour:
    """JSON, and the connection stays."""
    return raw(encoded(status, json.dumps(value).encode(), "Content-Type: application/json", *headers))


def matrix_error(status: int, errcode: str, error: str, *headers: str, **extra: Any) -> Behaviour:
    return answer({"errcode": errcode, "error": error, **extra}, status, *headers)


def html(status: int = 502) -> Behaviour:
    """What a proxy in between says."""
    return raw(encoded(status, b"<html><body>Bad Gateway</body></html>", "Content-Type: text/html"))


def redirect(location: str, status: int = 302) -> Behaviour:
    return raw(encoded(status, b"", f"Location: {location}"))


def raw(*parts: bytes) -> Behaviour:
    """These bytes, whatever they mean."""

    def behave(connection: Connection) -> None:
        for part in parts:
            connection.send(part)

    return behave


def then_close(behaviour: Behaviour) -> Behaviour:
    """First that, then hang up without having announced it."""

    def behave(connection: Connection) -> None:
        behaviour(connection)
        connection.close()

    return behave


def hang_up(connection: Connection) -> None:
    """No answer, and the connection ends."""
    connection.close()


def silence(connection: Connection) -> None:
    """No answer, and the connection stays."""
    connection.wait_until_closed()


def when(event: threading.Event, behaviour: Behaviour) -> Behaviour:
    """That, but not before the event."""

    def behave(connection: Connection) -> None:
        assert event.wait(PATIENCE)
        behaviour(connection)

    return behave


def drip(data: bytes, seconds: float = 1.0) -> Behaviour:
    """A byte, a pause, a byte, a pause …"""

    def behave(connection: Connection) -> None:
        for byte in data:
            connection.send(bytes([byte]))
            if connection.stopping.wait(seconds):
                return

    return behave


def chunked(chunks: Iterable[bytes], *, complete: bool = True) -> Behaviour:
    """`complete=False`: it hangs up in the middle."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return raw(head, body, b"0\r\n\r\n") if complete else then_close(raw(head, body))


def until_close(body: bytes) -> Behaviour:
    """An answer that ends with its connection."""
    return then_close(raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", body))
