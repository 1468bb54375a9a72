"""The calls that flowbridge makes to a homeserver. Every one raises MatrixError when it does not succeed."""

import contextlib
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from flowbridge import __version__
from flowbridge.errors import BadGateway, Errcode, HomeserverError, TooLarge
from flowbridge.homeserver import answers, large_json, paths, standing
from flowbridge.homeserver.address import Locator
from flowbridge.homeserver.connection import NoAnswer, Oversize
from flowbridge.homeserver.pool import Answer, Pool
from flowbridge.homeserver.standing import Standing
from flowbridge.homeserver.sync import Read, SyncClient
from flowbridge.limits import peer
from flowbridge.limits.concurrency import Limiter
from flowbridge.models import Event
from flowbridge.models.timing import Timing

# Bytes of an answer.
SEND_LIMIT: Final = 64 * 1024
SOON_SECONDS: Final = 2.0  # for what is asked to be of help
READ_LIMIT: Final = 1024 * 1024  # an event has at most 64 KiB, its state form a few more
BULK_LIMIT: Final = 64 * 1024 * 1024  # all state of all rooms
REDACTION: Final = "m.room.redaction"
ENCRYPTION: Final = {"algorithm": "m.megolm.v1.aes-sha2"}
# Connections, apart for each purpose: what takes long holds up nothing else.
CALLS: Final = 128  # for sends and other short calls
READERS: Final = 256  # for reads that may be large or slow, so that no send waits for one
POLLS: Final = 1_024  # for the long polls of live streams
GUESTS: Final = 32  # for calls without a token: a login costs the homeserver half a second of hashing
GUESTS_OF_ONE: Final = 8  # of one address
QUESTIONS: Final = 64  # calls at once that requests make before they are accepted: half of the connections for sends
QUESTIONS_OF_ONE: Final = 16

_HEAD: Final = f"User-Agent: flowbridge/{__version__}\r\nAccept: application/json\r\n".encode()
_JSON_HEAD: Final = _HEAD + b"Content-Type: application/json\r\n"


class Homeserver:
    """One homeserver, wherever it currently is. `deadline`: seconds for a whole call."""

    def __init__(self, locator: Locator, tls: ssl.SSLContext, *, deadline: float, timing: Timing = Timing()) -> None:
        self.deadline = deadline
        pool = partial(Pool, locator, tls, timing=timing)
        self._calls = pool(most=CALLS)
        self._guest_calls = pool(most=GUESTS)
        self._reads = pool(most=READERS)
        self._polls = pool(most=POLLS)
        self.read: Read = partial(self._read, self._reads)
        self.poll: Read = partial(self._read, self._polls)  # for live streams
        # For the sync of a device of the bridge. What any other sync with the same token brings for the device is not
        # brought again, so `on_sync` is given the token and the answer before its next_batch can be used.
        self.device_poll: Read = partial(self._read, self._polls, is_device=True)
        self.on_sync: Callable[[str, Any], Awaitable[None]] | None = None
        self._pages = SyncClient(partial(self._read, self._calls))  # a delivery waits for them
        self._guests = Limiter("calls without a token", GUESTS, GUESTS_OF_ONE)
        self._questions = Limiter("questions to the homeserver", QUESTIONS, QUESTIONS_OF_ONE)

    async def send(self, token: str, event: Event, txn_id: str) -> Answer:
        """One attempt at a send: a state event to `/state/`, any other with its txnId. The answer as it came.

        A redaction goes to `/redact/`: Synapse 1.163 answers 500 to one that comes by `/send/`.
        """
        body = event.content
        if event.state_key is not None:
            target = paths.state_target(event.room, event.type, event.state_key)
        elif event.type == REDACTION and (redaction := _redaction(body)) is not None:
            target, body = paths.redact_target(event.room, redaction[0], txn_id), redaction[1]
        else:
            target = paths.send_target(event.room, event.type, txn_id)
        return await self.call("PUT", target, token=token, body=body)

    async def is_encrypted(self, token: str, room_id: str, query: str = "") -> bool:
        """Whether messages in this room are encrypted. Raises MatrixError unless the homeserver plainly says so.

        `query`: as whom an application service asks, with its `?`.
        """
        answer = await self.call("GET", paths.state_target(room_id, "m.room.encryption", "") + query, token=token)
        if answer.status == 404 and answers.error(answer).errcode == Errcode.NOT_FOUND:
            return False
        if answer.status != 200:
            raise answers.error(answer)
        return True

    async def is_joined(self, token: str, room_id: str, user_id: str) -> bool:
        """Whether a user is in a room, as far as this token may know. Raises MatrixError when that is unknown."""
        answer = await self.call("GET", paths.state_target(room_id, "m.room.member", user_id), token=token)
        if answer.status in (403, 404) and isinstance(answers.error(answer), HomeserverError):
            return False
        return answers.success(answer).get("membership") == "join"

    async def membership(self, token: str, room_id: str, user_id: str) -> str:
        """Of a user in a room; "" also where this token may not see it."""
        answer = await self._question("GET", paths.state_target(room_id, "m.room.member", user_id), token)
        if answer.status in (403, 404) and isinstance(answers.error(answer), HomeserverError):
            return ""
        return str(answers.success(answer).get("membership", ""))

    async def sender_of(self, token: str, room_id: str, event_id: str) -> str | None:
        """Who sent an event; None when there is none in the room, as far as this token may know.

        Raises MatrixError when that is unknown, or not known soon: for a check that may be left out.
        """
        target = paths.event_target(room_id, event_id)
        answer = await self._question("GET", target, token, limit=READ_LIMIT, deadline=SOON_SECONDS)
        if answer.status in (403, 404) and answers.error(answer).errcode in (Errcode.NOT_FOUND, Errcode.FORBIDDEN):
            return None
        found = (await success(answer)).get("sender")
        return found if isinstance(found, str) else ""

    async def account_data(self, token: str, user_id: str, type_: str) -> dict[str, Any]:
        """What a user's clients keep under this name; {} if there is nothing."""
        answer = await self._question("GET", paths.account_data_target(user_id, type_), token, limit=READ_LIMIT)
        if answer.status == 404 and answers.error(answer).errcode == Errcode.NOT_FOUND:
            return {}
        return answers.success(answer)

    async def set_account_data(self, token: str, user_id: str, type_: str, content: Mapping[str, Any]) -> None:
        body = large_json.write(content)
        answers.success(await self._question("PUT", paths.account_data_target(user_id, type_), token, body))

    async def create_direct_room(self, token: str, user_id: str, *, encrypted: bool = False) -> str:
        """A room with this user, who is invited; returns its id."""
        request: dict[str, Any] = {"is_direct": True, "preset": "trusted_private_chat", "invite": [user_id]}
        if encrypted:
            request["initial_state"] = [{"type": "m.room.encryption", "state_key": "", "content": ENCRYPTION}]
        answer = await self._question("POST", f"{paths.CLIENT}/createRoom", token, large_json.write(request))
        room_id = answers.success(answer).get("room_id")
        if not isinstance(room_id, str) or not room_id.startswith("!"):
            raise BadGateway("the homeserver's answer to a new room names no room_id")
        return room_id

    async def standing(self, token: str, room_id: str, user_id: str) -> Standing:
        """How a user stands to a room that it is not in, as far as this token may know. Raises MatrixError."""
        answer = await self.call("GET", paths.summary_target(room_id), token=token, limit=READ_LIMIT)
        if answer.status != 200:
            error = answers.error(answer)
            if error.status >= 429 or not isinstance(error, HomeserverError):
                raise error
            found = standing.of_refusal(user_id, room_id, error)
        else:
            found = standing.of_summary(user_id, room_id, answers.success(answer))
        if found.membership not in ("leave", "") or found.access == "none":
            return found
        target = paths.state_target(room_id, "m.room.member", user_id) + "?format=event"
        answer = await self.call("GET", target, token=token)
        if answer.status != 200:  # it was never in this room, or may not see it any more
            return found
        return standing.as_member(found, answers.success(answer))

    async def recent(
        self, token: str, room_id: str, before: str, *, only: Mapping[str, Any] | None = None, limit: int = 100
    ) -> tuple[list[dict[str, Any]], str]:
        """Up to 100 events of a room, newest first, and where the page before them begins ("" at the start).

        `only`: a room event filter (specification, "RoomEventFilter"). With one a page may be empty although it is not
        the last; the last one names no `end`, or the one before it again.
        """
        page = await self._pages.messages(token, room_id, since=before, backwards=True, only=only, limit=limit)
        return page.events, page.end if page.events or only else ""

    async def read_state(
        self, token: str, room_id: str, type_: str, state_key: str, query: str, *, any_status: bool = False
    ) -> Answer:
        """GET a state event; the answer as it came, when it is a 200, or `any_status`."""
        target = paths.state_target(room_id, type_, state_key) + (f"?{query}" if query else "")
        if any_status:
            return await self.call("GET", target, token=token, limit=READ_LIMIT)
        return await self._get(target, token=token)

    async def resolve(self, token: str, alias: str) -> str:
        """The room id of an alias, without joining the room."""
        room_id = answers.success(await self._question("GET", paths.alias_target(alias), token)).get("room_id")
        if not isinstance(room_id, str) or not room_id.startswith("!"):
            raise BadGateway("the homeserver's answer for an alias names no room_id")
        return room_id

    async def is_public(self, token: str, room_id: str) -> bool:
        """Whether a room is in the homeserver's room directory."""
        answer = answers.success(await self._question("GET", paths.listing_target(room_id), token))
        return answer.get("visibility") == "public"

    async def versions(self) -> Answer:
        """GET /versions; the answer as it came, when it is a 200."""
        return await self._get("/_matrix/client/versions")

    async def whoami(self, token: str) -> tuple[str, str | None]:
        """Whose token this is: user id and, unless it has none, device id."""
        answer = answers.success(await self.call("GET", f"{paths.CLIENT}/account/whoami", token=token))
        user_id, device_id = answer.get("user_id"), answer.get("device_id")
        if not isinstance(user_id, str) or not isinstance(device_id, str | None):
            raise BadGateway("the homeserver's /account/whoami names no user_id")
        if not f"{user_id}{device_id or ''}".isprintable():  # users name devices, and not every name fits a database
            raise BadGateway("the homeserver's /account/whoami names a user or device with control characters")
        return user_id, device_id

    async def join(self, token: str, room_or_alias: str) -> str:
        """Join a room, if not joined yet, and return its room id."""
        answer = answers.success(await self._question("POST", paths.join_target(room_or_alias), token, b"{}"))
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
        answer = await self.call("POST", f"{paths.CLIENT}/login", body=large_json.write(request))
        token = answers.success(answer).get("access_token")
        if not isinstance(token, str):
            raise BadGateway("the homeserver's answer to a login names no access_token")
        return token

    async def call(
        self,
        method: str,
        target: str,
        *,
        token: str = "",
        body: bytes = b"",
        limit: int = SEND_LIMIT,
        deadline: float | None = None,
        forwarded: Iterable[tuple[bytes, bytes]] = (),
        pool: Pool | None = None,
    ) -> Answer:
        """Any call; the answer whatever its status. Raises BadGateway or GatewayTimeout when there is none.

        `deadline`, `pool`: seconds for this call, or connections, where they are not the usual ones. `forwarded`:
        headers that name the caller.
        """
        head = _head(token, _JSON_HEAD if body else _HEAD)
        for pair in forwarded:
            head += b"%b: %b\r\n" % pair
        pool = self._calls if pool is None else pool
        try:
            return await pool.exchange(method, target, head, body, deadline=deadline or self.deadline, limit=limit)
        except NoAnswer as failure:
            raise answers.no_answer(failure) from None

    async def guest_call(
        self,
        method: str,
        target: str,
        *,
        token: str = "",
        body: bytes = b"",
        limit: int = SEND_LIMIT,
        forwarded: Iterable[tuple[bytes, bytes]] = (),
    ) -> Answer:
        """As `call`, for a caller that has not been authenticated: on connections of its own, a share per address."""
        async with self._guests.turn(peer.who(), self.deadline):
            pool = self._guest_calls
            return await self.call(method, target, token=token, body=body, limit=limit, forwarded=forwarded, pool=pool)

    def close(self) -> None:
        for pool in (self._calls, self._reads, self._polls, self._guest_calls):
            pool.close()

    async def _read(
        self,
        pool: Pool,
        target: str,
        *,
        token: str,
        seconds: float | None = None,
        limit: int | None = None,
        is_device: bool = False,
    ) -> tuple[bytes, Any]:
        """GET what may be large, or long in coming: the bytes of a 200, and their JSON value.

        `seconds` (default: the deadline of all calls) may be as many as a long poll needs. Raises TooLarge for an
        answer of more than `limit` (at most BULK_LIMIT) bytes.
        """
        most = min(limit or BULK_LIMIT, BULK_LIMIT)
        deadline = self.deadline if seconds is None else seconds
        try:
            answer = await pool.exchange("GET", target, _head(token), b"", deadline=deadline, limit=most)
        except Oversize:
            raise TooLarge(f"the homeserver's answer is larger than {most} bytes: ask for less") from None
        except NoAnswer as failure:
            raise answers.no_answer(failure) from None
        value = await json_of(answer)
        if self.on_sync is not None and not is_device and target.startswith(paths.SYNC):
            await self.on_sync(token, value)
        return answer.body, value

    async def _question(
        self,
        method: str,
        target: str,
        token: str,
        body: bytes = b"",
        limit: int = SEND_LIMIT,
        deadline: float | None = None,
    ) -> Answer:
        """A call for a request, within its caller's share of the connections."""
        async with self._questions.turn(peer.who(), deadline or self.deadline):
            return await self.call(method, target, token=token, body=body, limit=limit, deadline=deadline)

    async def _get(self, target: str, *, token: str = "") -> Answer:
        answer = await self._question("GET", target, token, limit=READ_LIMIT)
        await success(answer)
        return answer


def _head(token: str, rest: bytes = _HEAD) -> bytes:
    return b"Authorization: Bearer %b\r\n%b" % (token.encode("ascii"), rest) if token else rest


def _redaction(content: bytes) -> tuple[str, bytes] | None:
    """The event that a redaction is for, and the rest of its content; None when it names none.

    From room version 11 on the homeserver puts `redacts` into the content itself, before it beside the content.
    """
    rest = large_json.read(content)
    event_id = rest.pop("redacts", None)
    if not isinstance(event_id, str) or not event_id.startswith("$"):
        return None
    return event_id, large_json.write(rest)


async def json_of(answer: Answer) -> Any:
    """The JSON value of a 200, which is read without holding up the event loop: 10 MB took 0.2 s.

    Raises MatrixError for every other answer.
    """
    if answer.status == 200:
        with contextlib.suppress(ValueError, RecursionError):
            return await large_json.aside(len(answer.body), large_json.read, answer.body)
    raise answers.error(answer)


async def success(answer: Answer) -> dict[str, Any]:
    """As `json_of`, for an answer that has to be an object."""
    value = await json_of(answer)
    if not isinstance(value, dict):
        raise answers.error(answer)
    return value
