"""The metrics of /metrics: counters that are updated as things happen, and gauges that are set on request."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_registry = CollectorRegistry()


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"flowbridge_{name}", text, labels, registry=_registry)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"flowbridge_{name}", text, labels, registry=_registry)


requests = _counter("http_requests", "Requests answered, by HTTP status.", "status")
accepted = _counter("events_accepted", "Events taken, by surface.", "surface")
settled = _counter("events_settled", "Events that ended, by how: sent or dead.", "state")
for _state in ("sent", "dead"):
    settled.labels(_state)  # from 0: of a series that begins with 1, Prometheus sees no increase
attempts = _counter("attempts", "Attempts to send, by what came of them.", "verdict")
rate_limited = _counter("rate_limited_seconds", "Seconds of pause that the homeserver asked for (429).")
refused_unlisted = _counter("refused_unlisted", "Refused calls too many for the delivery log.")
dropped_early = _counter("sent_dropped_early", "Sent events deleted before their time: the log was at its bound.")
leases_lost = _counter("leases_lost", "Rooms taken over by another process, or held for too long.")
commit_seconds = Histogram(
    "flowbridge_commit_seconds",
    "Time of a group commit of the store.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
    registry=_registry,
)
commit_failures = _counter("commit_failures", "Commits that the store refused or did not answer.")
connections_refused = _counter("connections_refused", "Connections of callers refused, by the bound met.", "reason")
connections_evicted = _counter("connections_evicted", "Idle connections of callers closed to make room for others.")
hook_requests = _counter(
    "hook_requests",
    "Requests to hooks, by the source and what came of them: accepted, repeated, nothing (to say: a ping, an ignored "
    "event), invalid, unavailable (503); refused (401, 429), and what failed before, have the source unknown.",
    "source",
    "outcome",
)
hook_template_failures = _counter(
    "hook_template_failures", "Requests to hooks whose template failed: a summary was sent. By the source.", "source"
)
live_dropped = _counter("live_dropped", "Streams of live events that were closed because their listener did not read.")
encrypted = _counter("events_encrypted", "Events encrypted for their rooms.")
decrypted = _counter("events_decrypted", "Encrypted events that were decrypted for a reader.")
undecryptable = _counter(
    "events_undecryptable",
    "Encrypted events that could not be decrypted for a reader: no_key (none has come, or none from so far back), "
    "withheld (its sender shares none), replayed, malformed, algorithm (an unknown one), failed, no_device.",
    "reason",
)
crypto_sessions = _counter(
    "crypto_sessions", "Sessions of encryption made: room (its messages), device (keys for another device).", "kind"
)
devices_unreached = _counter("devices_unreached", "Times that another device could not be given a room's key.")
to_device_dropped = _counter(
    "to_device_dropped",
    "Messages for the bridge's device that were dropped: unreadable, not_meant (for it), room_key (a bad one).",
    "reason",
)

queued = _gauge("queued_events", "Events that wait to be sent.")
oldest_queued_seconds = _gauge("oldest_queued_seconds", "Age of the event that has waited longest; 0 without one.")
dead = _gauge("dead_events", "Dead letters.")
lanes = _gauge("lanes", "Rooms (of an account) held by this process, by what they do.", "state")
uncertain = _gauge("uncertain_lanes", "Rooms whose first event may have been sent already.")
accounts_paused = _gauge("accounts_paused", "Accounts whose token the homeserver does not accept.")
homeserver_up = _gauge("homeserver_up", "0 while the homeserver cannot be reached.")
hooks_file_refused = _gauge("hooks_file_refused", "1 while hooks.yaml cannot be used, and what was read before holds.")
live_listeners = _gauge("live_listeners", "Open streams of live events.")
live_accounts = _gauge("live_accounts", "Accounts that are listened to: one long poll each.")
device_held = _gauge("device_held", "1 while this process has the bot's device, and encrypts with it.")
device_sync_seconds = _gauge("device_sync_seconds", "Since the device's last sync began; 0 while it is not held.")
log_seconds = _gauge("log_seconds", "Age of the oldest sent event in the delivery log; 0 without one.")
store_bytes = _gauge("store_bytes", "Bytes that the store takes.")
store_full = _gauge("store_full", "1 while nothing is accepted because the store is full.")


_counted: dict[tuple[Counter, tuple[str, ...]], int] = {}  # since the metrics were shown last


def count(counter: Counter, *labels: str) -> None:
    """Count one more, on the event loop. Prometheus' own counters take 1.5 µs each, and a send counts four times."""
    key = (counter, labels)
    _counted[key] = _counted.get(key, 0) + 1


def render() -> bytes:
    """All metrics in Prometheus' text format."""
    while _counted:
        (counter, labels), number = _counted.popitem()
        (counter.labels(*labels) if labels else counter).inc(number)
    return generate_latest(_registry)
