"""How a hook is tried: its URL, one line of a shell that calls it as its sender would, and a body. Pure."""

import base64
import json
import shlex
from typing import Any
from urllib.parse import quote

from flowbridge import sources
from flowbridge.hooks.secrets import GITLAB, STANDARD, STANDARD_PREFIX
from flowbridge.models.hooks import TOKEN, Hook

# What each of the chat dialects has for a text; the others show any JSON.
_TEXT_KEYS = {"discord": "content", "gotify": "message", "ntfy": "message"}
# The header, and what stands before the signature; what is signed ($t is the time, $b the body); further headers.
_SIGNED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "github": ("X-Hub-Signature-256: sha256=", "$b", ()),
    "gitea": ("X-Gitea-Signature: ", "$b", ()),
    "grafana": ("X-Grafana-Alerting-Signature: ", "$b", ()),
    "slack": ("X-Slack-Signature: v0=", "v0:$t:$b", ("X-Slack-Request-Timestamp: $t",)),
    "stripe": ("Stripe-Signature: t=$t,v1=", "$t.$b", ()),
    "pagerduty": ("X-PagerDuty-Signature: v1=", "$b", ()),
    "sentry": ("Sentry-Hook-Signature: ", "$b", ()),
    STANDARD: ("webhook-signature: v1,", "msg_$t.$t.$b", ("webhook-id: msg_$t", "webhook-timestamp: $t")),
}


def url(base: str, hook: Hook, secret: str = "") -> str:
    """Where the hook is. With its secret in it, where that is a token, and known."""
    token = f"/{quote(secret, safe='')}" if secret and hook.verification.scheme == TOKEN else ""
    return f"{base}/hooks/{hook.name}{token}"


def curl(base: str, hook: Hook, secret: str) -> str:
    """A line for a shell; where its senders sign, it signs with openssl."""
    address = shlex.quote(url(base, hook, secret))
    body = shlex.quote(json.dumps({_TEXT_KEYS.get(hook.source, "text"): f"A test of the hook {hook.name}"}))
    scheme = hook.verification.scheme
    if scheme == TOKEN:
        return f"curl -H 'Content-Type: application/json' -d {body} {address}"
    if scheme == GITLAB and not secret.startswith(STANDARD_PREFIX):
        token = shlex.quote(f"X-Gitlab-Token: {secret}")
        return f"curl -H 'Content-Type: application/json' -H {token} -d {body} {address}"
    name, signed, more = _signed(hook)
    makes = f'printf %s "{signed}" | openssl dgst -sha256 {_key(scheme, secret)}'
    is_base64 = hook.verification.encoding == "base64" or _is_standard(scheme)
    signature = f"{makes} -binary | base64" if is_base64 else f"{makes} -r | cut -d' ' -f1"
    headers = " ".join(f'-H "{header}"' for header in (*more, f"{name}$({signature})"))
    return f"b={body}; t=$(date +%s); curl -H 'Content-Type: application/json' {headers} -d \"$b\" {address}"


def sample(hook: Hook) -> tuple[bytes, dict[str, str]]:
    """A body as the hook's source sends them, and its headers by lower-case name."""
    source = sources.BY_NAME.get(hook.source)
    body: Any = source.sample if source is not None else None
    headers = {name.lower(): value for name, value in (source.sample_headers if source is not None else {}).items()}
    if body is None:
        body = {_TEXT_KEYS.get(hook.source, "text"): f"A test of the hook {hook.name}"}
    if isinstance(body, str):
        return body.encode(), {"content-type": "text/plain", **headers}
    return json.dumps(body).encode(), {"content-type": "application/json", **headers}


def _signed(hook: Hook) -> tuple[str, str, tuple[str, ...]]:
    own = hook.verification
    if own.scheme == "hmac":
        stamped = bool(own.timestamp_header)
        more = (f"{_quoted(own.timestamp_header)}: $t",) if stamped else ()
        return f"{_quoted(own.header)}: {_quoted(own.prefix)}", "$t.$b" if stamped else "$b", more
    if own.scheme == "grafana" and own.timestamp_header:
        return _SIGNED["grafana"][0], "$t:$b", (f"{_quoted(own.timestamp_header)}: $t",)
    return _SIGNED[STANDARD if _is_standard(own.scheme) else own.scheme]


def _quoted(text: str) -> str:
    """Within double quotes of a shell. A header's name may hold a backtick, too."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")


def _is_standard(scheme: str) -> bool:
    return scheme in (STANDARD, GITLAB)


def _key(scheme: str, secret: str) -> str:
    if _is_standard(scheme):
        key = base64.b64decode(secret.removeprefix(STANDARD_PREFIX))
        return f"-mac HMAC -macopt hexkey:{key.hex()}"
    return f"-hmac {shlex.quote(secret)}"
