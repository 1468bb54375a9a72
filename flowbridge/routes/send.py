"""Sending events and reading state, on both surfaces."""

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from flowbridge.callers import Callers, Credential
from flowbridge.errors import BadContent, MatrixError, Problem
from flowbridge.homeserver import Homeserver, dialect
from flowbridge.intake import Intake
from flowbridge.models import Event, Payload, Surface
from flowbridge.routes import describe
from flowbridge.routes.endpoint import LOG, Endpoint, endpoint, headers_of, json_answer, read_body

DIALECTS = ("v3", "r0", "api/v1", "unstable")


class Sending:
    """The handlers of one surface."""

    def __init__(self, surface: Surface, intake: Intake, callers: Callers, homeserver: Homeserver) -> None:
        self._surface: Surface = surface
        self._intake = intake
        self._callers = callers
        self._homeserver = homeserver

    async def send(self, request: Request) -> Response:
        """POST/PUT …/rooms/{roomId}/send/{eventType}[/{txnId}]"""
        headers = headers_of(request)
        credential = self._callers.credential(headers, request.scope["query_string"])
        path = request.path_params
        room, event_type = dialect.room(path["roomId"]), dialect.event_type(path["eventType"])
        txn_id = dialect.segment(path["txnId"], "transaction id") if "txnId" in path else None
        found = await self._read(request, headers, event_type)
        event = await self._intake.check(room, event_type, found, as_state=False)
        return await self._accept(request, credential, event, txn_id)

    async def put_state(self, request: Request) -> Response:
        """PUT …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        headers = headers_of(request)
        credential = self._callers.credential(headers, request.scope["query_string"])
        path = request.path_params
        room, event_type = dialect.room(path["roomId"]), dialect.event_type(path["eventType"])
        state_key = dialect.segment(path.get("stateKey", ""), "state key", empty=True)
        found = _keyed(await self._read(request, headers, event_type), state_key, named="stateKey" in path)
        event = await self._intake.check(room, event_type, found, as_state=True)
        return await self._accept(request, credential, event, None)

    async def get_state(self, request: Request) -> Response:
        """GET …/rooms/{roomId}/state/{eventType}[/{stateKey}]"""
        credential = self._callers.credential(headers_of(request), request.scope["query_string"])
        path = request.path_params
        room, event_type = dialect.room(path["roomId"]), dialect.event_type(path["eventType"])
        state_key = dialect.segment(path.get("stateKey", ""), "state key", empty=True)
        query = "format=event" if request.query_params.get("format") == "event" else ""
        caller = await self._callers.identify(credential)
        try:
            room_id = await self._intake.room_id(caller, room)
            answer = await self._homeserver.read_state(caller.token, room_id, event_type, state_key, query)
        except MatrixError as error:
            raise self._callers.refused(caller, error) from None
        return Response(answer.body, answer.status, media_type="application/json")

    async def _read(self, request: Request, headers: Mapping[str, str], event_type: str) -> Payload:
        body = await read_body(request, headers)
        return await self._intake.receive(body, headers.get("content-type", ""), event_type, self._surface)

    async def _accept(self, request: Request, credential: Credential, event: Event, txn_id: str | None) -> Response:
        caller, event_id = await self._intake.accept(credential, event, txn_id)
        request.scope[LOG] = {"user": caller.user_id, "event_id": event_id}
        return json_answer({"event_id": event_id})


def _keyed(found: Payload, state_key: str, *, named: bool) -> Payload:
    """The state key of the path, or of the body where the path has none; a body that differs is refused."""
    if found.state_key is None or found.state_key == state_key:
        return Payload(found.content, state_key)
    if named:
        message = f"is {found.state_key[:255]!r} but the path says {state_key!r}"
        raise BadContent([Problem("/state_key", message, "body")])
    return found


def routes(intake: Intake, callers: Callers, homeserver: Homeserver) -> list[Endpoint]:
    """Both surfaces. Of the Matrix dialects only v3 is documented: the others are the same."""
    found = _routes("", Sending("flow", intake, callers, homeserver), documented=True)
    matrix = Sending("matrix", intake, callers, homeserver)
    for name in DIALECTS:
        found += _routes(f"/_matrix/client/{name}", matrix, documented=name == "v3")
    return found


def _routes(prefix: str, handlers: Sending, *, documented: bool) -> list[Endpoint]:
    send, state = (
        f"{prefix}/rooms/{{roomId}}/send/{{eventType}}",
        f"{prefix}/rooms/{{roomId}}/state/{{eventType}}",
    )
    table = [
        ("POST", send, handlers.send),
        ("PUT", send, handlers.send),
        ("POST", f"{send}/{{txnId}}", handlers.send),
        ("PUT", f"{send}/{{txnId}}", handlers.send),
        ("PUT", state, handlers.put_state),
        ("PUT", f"{state}/{{stateKey}}", handlers.put_state),
        ("GET", state, handlers.get_state),
        ("GET", f"{state}/{{stateKey}}", handlers.get_state),
    ]
    return [
        endpoint(method, path, handler, describe.event(method, path), documented=documented)
        for method, path, handler in table
    ]
