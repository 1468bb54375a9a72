"""The OpenAPI operations of the live streams, in words."""

from flowbridge.web.describe import PARAMETERS, UPSTREAM, Operation, operation, query

_ABOUT = (
    "Server-Sent Events. Each message is one event of a room, as today's client-server API gives it with its "
    "`room_id`, in one line of JSON, and its `id` is a position: sent back in `Last-Event-ID`, which an EventSource "
    "does by itself, the stream goes on there without gap or repeat, after a restart of the bridge, too. Messages and "
    "state events come in the homeserver's order within a room; between rooms there is none. A comment comes at least "
    "every 15 s. However many listen, the homeserver sees one long poll per access token; while it is away, the stream "
    "stays open. A message of the type `error` is the last one and says why: `M_UNKNOWN_TOKEN`, or "
    "`M_LIMIT_EXCEEDED` for who does not read fast enough and may connect again. An API key needs `types=` when it is "
    "for some event types only. A client that decrypts messages needs a token of its own: with one token both are one "
    "device to the homeserver, and the keys that are sent to it go to whoever asks first."
)
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_LAST_EVENT_ID: Operation = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The `id` of the last message that was read. Wins over `last_event_id`.",
    "schema": {"type": "string", "maxLength": 8192},
}
_CHOICE = [
    query("types", "Only these event types; `m.room.*` are all that begin so. With commas.", "m.room.message"),
    query("not_senders", "Nothing of these users. With commas.", "@noisy:localhost"),
    query("own", "`false`: nothing that the account itself sent, so that a bot does not answer itself.", "false"),
    query("last_event_id", "As `Last-Event-ID`, for who cannot set headers.", ""),
    _LAST_EVENT_ID,
]
_ERRORS = (400, *UPSTREAM)

LIVE = operation(
    "live",
    "Flow surface",
    "Listen to all rooms",
    description="The rooms that the account is in, those too that it joins later; with an API key that is for some "
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
