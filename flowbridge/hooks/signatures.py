"""Whether a request to a hook comes from its sender: one table of how senders prove that (contract §6). Pure.

The raw bytes are checked, before anything is parsed. Whatever is malformed is wrong, and raises nothing.

Why not the library `standardwebhooks` for its scheme: of malformed headers and secrets it lets ValueError,
UnicodeDecodeError and JSONDecodeError through, takes any text for base64, and parses the body. Here that scheme is a
row of the table; the tests sign with the library.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowbridge.hooks.known import Secret
from flowbridge.models.hooks import TOKEN, Verification

Headers = Mapping[str, str]  # by lower-case name

TOLERANCE_SECONDS = 300  # where a time is signed: Stripe's, Slack's and Standard Webhooks' own
MAX_SIGNATURES = 20  # in one header: senders list one for each secret
LEAST_WORK = 2  # HMACs for a refusal: as many as a hook has secrets, so that its time tells nothing of the hook

_TIME = re.compile(r"[0-9]{1,13}")
_MILLISECONDS = 100_000_000_000  # from here on a time is in these
_WHSEC = "whsec_"


@dataclass(frozen=True, slots=True)
class Scheme:
    """HMAC-SHA256 over what `before` says, and the body. `headers`: of these the first that is there, and its prefix.

    `separator`: between several signatures. `time`: the header of the time that is signed, or the prefix of the entry
    that holds it, beside the signatures; none is signed where this is empty. `before`: {time} and {id} stand for what
    the headers say; each of these is tried. `id`: its header.
    """

    headers: Mapping[str, str]
    separator: str = ""
    encoding: Literal["hex", "base64"] = "hex"
    time: str = ""
    before: Sequence[str] = ("",)
    id: str = ""


_GITHUB = "x-hub-signature-256"
_STANDARD = Scheme({"webhook-signature": "v1,"}, " ", "base64", "webhook-timestamp", ("{id}.{time}.",), "webhook-id")
GITLAB = "gitlab"
SCHEMES: Mapping[str, Scheme] = {
    "github": Scheme({_GITHUB: "sha256="}),
    "gitea": Scheme({"x-forgejo-signature": "", "x-gitea-signature": "", _GITHUB: "sha256="}),
    "slack": Scheme({"x-slack-signature": "v0="}, time="x-slack-request-timestamp", before=("v0:{time}:",)),
    "stripe": Scheme({"stripe-signature": "v1="}, ",", time="t=", before=("{time}.",)),
    "pagerduty": Scheme({"x-pagerduty-signature": "v1="}, ","),
    "sentry": Scheme({"sentry-hook-signature": ""}),
    "standard-webhooks": _STANDARD,
    # With a timestamp header that the hook names:
    "grafana": Scheme({"x-grafana-alerting-signature": ""}, before=("{time}:",)),
    "hmac": Scheme({}, before=("{time}.", "{time}:")),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request brought. `token`: what stands in its path for one."""

    headers: Headers
    token: str = field(default="", repr=False)


def has_token(verification: Verification, secrets: Sequence[Secret], asked: Asked) -> bool:
    """Whether a bare token is enough for this hook, and right. Needs no body."""
    if verification.scheme == TOKEN:
        return _is_one_of(secrets, _tokens(asked))
    if verification.scheme == GITLAB:  # a signing token is never sent itself
        plain = [secret for secret in secrets if not secret.text.startswith(_WHSEC)]
        return _is_one_of(plain, [asked.headers.get("x-gitlab-token", "")])
    return False


def wrong(verification: Verification, secrets: Sequence[Secret], asked: Asked, body: bytes, now: float) -> str:
    """Why the request is refused, as a clause without secrets; "" for one that is right.

    Without any secrets, as for a hook that there is not, it takes the same time.
    """
    if has_token(verification, secrets, asked):
        return ""
    check = _Check(asked.headers, body, now)
    why = _unsigned(verification, secrets, check)
    check.work()
    return why


def _unsigned(verification: Verification, secrets: Sequence[Secret], check: "_Check") -> str:
    if not secrets:
        return "there is no such hook, or it has no secret"
    if verification.scheme == TOKEN:
        return "the token is wrong, or missing"
    if verification.scheme == GITLAB:
        signing = [secret for secret in secrets if secret.text.startswith(_WHSEC)]
        return check.wrong(_STANDARD, signing) if signing else "X-Gitlab-Token is wrong, or missing"
    return check.wrong(_scheme(verification), [secret for secret in secrets if secret.text])  # "" is no key


def _scheme(verification: Verification) -> Scheme:
    """The row of the table, with what the hook says of its sender."""
    found = SCHEMES[verification.scheme]
    if verification.scheme not in ("grafana", "hmac"):
        return found
    named = verification.timestamp_header.lower()
    before = found.before if named else ("",)
    if verification.scheme == "grafana":
        return Scheme(found.headers, time=named, before=before)
    headers = {verification.header.lower(): verification.prefix}
    return Scheme(headers, encoding=verification.encoding, time=named, before=before)


class _Check:
    """The check of one request."""

    def __init__(self, headers: Headers, body: bytes, now: float) -> None:
        self._headers = headers
        self._body = body
        self._now = now
        self._done = 0

    def wrong(self, scheme: Scheme, secrets: Sequence[Secret]) -> str:
        name = next((name for name in scheme.headers if name in self._headers), "")
        if not name:
            return f"{' or '.join(scheme.headers)} is missing"
        prefix, entries = scheme.headers[name], self._entries(name, scheme)
        signatures = [entry.removeprefix(prefix) for entry in entries if entry.startswith(prefix)]
        if not signatures:
            return f"{name} holds no signature that begins with {prefix!r}"
        time, is_late = "", False
        if scheme.time:
            found = self._time(scheme, entries)
            if found is None:
                return f"{scheme.time} is missing, or no time"
            time, is_late = found
        for before in self._before(scheme, time):
            for secret in secrets:
                expected = self._signature(before, secret, scheme)
                if any([hmac.compare_digest(expected, _normal(each, scheme)) for each in signatures]):  # noqa: C419 (all)
                    return f"{scheme.time} is more than {TOLERANCE_SECONDS} s away from now" if is_late else ""
        return f"{name} is wrong: another secret, or another body"

    def work(self) -> None:
        """Take as long as any refusal does."""
        while self._done < LEAST_WORK:
            self._hmac(b"a hook that there is not", b"")

    def _entries(self, name: str, scheme: Scheme) -> list[str]:
        value = self._headers[name].strip()
        if not scheme.separator:
            return [value]
        return [entry.strip() for entry in value.split(scheme.separator, 2 * MAX_SIGNATURES)[:MAX_SIGNATURES]]

    def _time(self, scheme: Scheme, entries: Sequence[str]) -> tuple[str, bool] | None:
        """The time as it is signed, and whether it is too far from now."""
        if scheme.time.endswith("="):
            text = next((entry.removeprefix(scheme.time) for entry in entries if entry.startswith(scheme.time)), "")
        else:
            text = self._headers.get(scheme.time, "").strip()
        if not text.isascii() or not _TIME.fullmatch(text):
            return None
        seconds = int(text) / (1_000 if int(text) >= _MILLISECONDS else 1)
        return text, abs(self._now - seconds) > TOLERANCE_SECONDS

    def _before(self, scheme: Scheme, time: str) -> Iterator[bytes]:
        id_ = self._headers.get(scheme.id, "") if scheme.id else ""
        for before in scheme.before:
            yield before.replace("{time}", time).replace("{id}", id_).encode("latin-1", "replace")

    def _signature(self, before: bytes, secret: Secret, scheme: Scheme) -> bytes:
        found = self._hmac(_key(secret.text, scheme), before)
        return base64.b64encode(found) if scheme.encoding == "base64" else found.hex().encode()

    def _hmac(self, key: bytes, before: bytes) -> bytes:
        self._done += 1
        made = hmac.new(key, before, hashlib.sha256)
        made.update(self._body)
        return made.digest()


def _key(secret: str, scheme: Scheme) -> bytes:
    """Standard Webhooks writes its keys as base64; all others are the text itself."""
    if scheme is _STANDARD and secret.startswith(_WHSEC):
        try:
            return base64.b64decode(secret.removeprefix(_WHSEC), validate=True)
        except (binascii.Error, ValueError):
            pass
    return secret.encode()


def _normal(signature: str, scheme: Scheme) -> bytes:
    signature = signature.strip()
    return (signature.lower() if scheme.encoding == "hex" else signature).encode("utf-8", "replace")


def _is_one_of(secrets: Sequence[Secret], tokens: Sequence[str]) -> bool:
    """No early return: the time taken must reveal nothing about the secrets."""
    found = False
    for token in tokens:
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        for secret in secrets:
            if hmac.compare_digest(digest, secret.digest) and token:
                found = True
    return found


def _tokens(asked: Asked) -> list[str]:
    """Where a sender may put its token: each of them is looked at, since a proxy may add a header of its own."""
    scheme, _, rest = asked.headers.get("authorization", "").strip().partition(" ")
    found = [asked.token, asked.headers.get("x-gitlab-token", "")]
    if scheme.lower() == "bearer":
        found.append(rest.strip())
    elif scheme.lower() == "basic":
        found.append(_password(rest.strip()))
    return [token for token in found if token]


def _password(basic: str) -> str:
    try:
        return base64.b64decode(basic, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
