"""The OpenAPI operations of the live streams, in words."""

from flowbridge.web.describe import PARAMETERS, UPSTREAM, Operation, operation, query

_ABOUT = (
    "Server-Sent Events. Each message is one event of a room in the form of the current client-server API with its "
    "`room_id`, as one line of JSON. Its `id` is a position: sent back in `Last-Event-ID`, which an EventSource does "
    "by itself, it resumes the stream there without gap or repeat, even after a restart of the bridge. Within a room, "
    "messages and state events come in the homeserver's order; between rooms there is no order. A comment comes at "
    "least every 15 s. However many listen, the homeserver sees one long poll per access token; while it is away, the "
    "stream stays open. A message of the type `error` is the last one and says why the stream ends: "
    "`M_UNKNOWN_TOKEN`, or `M_LIMIT_EXCEEDED` for a listener that reads too slowly, and may connect again. An API key "
    "that is for some event types only needs `types=`. A client that decrypts messages needs an access token of its "
    "own: with a shared one both are the same device to the homeserver, and the first to ask gets the keys that are "
    "sent to it."
)
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_LAST_EVENT_ID: Operation = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The `id` of the last message that was read. Takes precedence over `last_event_id`.",
    "schema": {"type": "string", "maxLength": 8192},
}
_CHOICE = [
    query("types", "Only these event types, separated by commas; `m.room.*` stands for a prefix.", "m.room.message"),
    query("not_senders", "No events of these users, separated by commas.", "@noisy:localhost"),
    query("own", "`false`: no events of the account itself, so that a bot does not answer itself.", "false"),
    query("last_event_id", "As `Last-Event-ID`, for a client that cannot set headers.", ""),
    _LAST_EVENT_ID,
]
_ERRORS = (400, *UPSTREAM)

LIVE = operation(
    "live",
    "Flow surface",
    "Listen to all rooms",
    description="The rooms that the account is in, including those that it joins later; with an API key for some "
    f"rooms, those. {_ABOUT}",
    ok="A stream without end.",
    answers=_STREAM,
    errors=_ERRORS,
    parameters=_CHOICE,
)
ROOM_LIVE = operation(
    "roomLive",
    "Flow surface",
    "Listen to a room",
    description=_ABOUT,
    ok="A stream without end.",
    answers=_STREAM,
    errors=_ERRORS,
    parameters=[PARAMETERS["roomId"], *_CHOICE],
)
