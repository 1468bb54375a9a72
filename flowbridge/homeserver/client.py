"""The calls that flowbridge makes to a homeserver. Every one raises MatrixError when it does not succeed."""

import json
import ssl
from typing import Final

from flowbridge import __version__
from flowbridge.errors import BadGateway
from flowbridge.homeserver import dialect, verdict
from flowbridge.homeserver.address import Address, AddressError, AddressUnknown, Locator
from flowbridge.homeserver.wire import Answer, Wire, WireError
from flowbridge.models import Event

SEND_LIMIT: Final = 64 * 1024  # bytes of an answer to a send
READ_LIMIT: Final = 1024 * 1024  # bytes of an answer to a read: an event has at most 64 KiB, its state form a few more

_HEAD: Final = f"User-Agent: flowbridge/{__version__}\r\nAccept: application/json\r\n".encode()
_JSON_HEAD: Final = _HEAD + b"Content-Type: application/json\r\n"


class Homeserver:
    """One homeserver, wherever it is just now. `deadline`: seconds for a whole call."""

    def __init__(self, locator: Locator, tls: ssl.SSLContext, *, deadline: float) -> None:
        self.locator = locator
        self.deadline = deadline
        self._tls = tls
        self._wire: Wire | None = None
        self._prefix = ""
        locator.on_change = self._move

    async def send(self, token: str, event: Event, room_id: str, txn_id: str) -> str:
        """Send an event: a state event to `/state/`, any other with its txnId. Returns the event id."""
        if event.state_key is None:
            target = dialect.send_target(room_id, event.type, txn_id)
        else:
            target = dialect.state_target(room_id, event.type, event.state_key)
        return verdict.event_id(await self.call("PUT", target, token=token, body=event.content))

    async def read_state(self, token: str, room_id: str, type_: str, state_key: str, query: str) -> Answer:
        """GET a state event; the answer as it came, when it is a 200."""
        target = dialect.state_target(room_id, type_, state_key) + (f"?{query}" if query else "")
        return await self._get(target, token=token)

    async def versions(self) -> Answer:
        """GET /versions; the answer as it came, when it is a 200."""
        return await self._get("/_matrix/client/versions")

    async def whoami(self, token: str) -> tuple[str, str | None]:
        """Whose token this is: user id and, unless it has none, device id."""
        answer = verdict.success(await self.call("GET", f"{dialect.CLIENT}/account/whoami", token=token))
        user_id, device_id = answer.get("user_id"), answer.get("device_id")
        if not isinstance(user_id, str) or not isinstance(device_id, str | None):
            raise BadGateway("the homeserver's /account/whoami names no user_id")
        return user_id, device_id

    async def join(self, token: str, room_or_alias: str) -> str:
        """Join a room (nothing happens when one is in it) and return its room id."""
        answer = verdict.success(await self.call("POST", dialect.join_target(room_or_alias), token=token, body=b"{}"))
        room_id = answer.get("room_id")
        if not isinstance(room_id, str) or not room_id.startswith("!"):
            raise BadGateway("the homeserver's answer to a join names no room_id")
        return room_id

    async def login(self, user: str, password: str, device_id: str) -> str:
        """Log in with a password and return the access token."""
        request = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": user},
            "password": password,
            "device_id": device_id,
            "initial_device_display_name": "flowbridge",
        }
        body = json.dumps(request).encode()
        token = verdict.success(await self.call("POST", f"{dialect.CLIENT}/login", body=body)).get("access_token")
        if not isinstance(token, str):
            raise BadGateway("the homeserver's answer to a login names no access_token")
        return token

    async def call(
        self, method: str, target: str, *, token: str = "", body: bytes = b"", limit: int = SEND_LIMIT
    ) -> Answer:
        """Any call; the answer whatever its status. Raises BadGateway or GatewayTimeout when there is none."""
        wire = self._wire or await self._connect()
        head = _JSON_HEAD if body else _HEAD
        if token:
            head = b"Authorization: Bearer %b\r\n%b" % (token.encode("ascii"), head)
        try:
            return await wire.exchange(method, self._prefix + target, head, body, deadline=self.deadline, limit=limit)
        except WireError as failure:
            raise verdict.no_answer(failure) from None

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    async def _get(self, target: str, *, token: str = "") -> Answer:
        answer = await self.call("GET", target, token=token, limit=READ_LIMIT)
        verdict.success(answer)
        return answer

    async def _connect(self) -> Wire:
        try:
            await self.locator.address()
        except (AddressError, AddressUnknown) as error:
            raise BadGateway(f"the homeserver's address is not known: {error}") from None
        assert self._wire is not None
        return self._wire

    def _move(self, address: Address) -> None:
        """The homeserver is elsewhere now: what is under way ends where it began."""
        self.close()
        self._wire = Wire(address.origin, self._tls)
        self._prefix = address.prefix
