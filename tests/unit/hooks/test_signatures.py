"""The table of schemes, against what the senders' own documentation and libraries make."""

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from flowbridge.hooks import signatures
from flowbridge.hooks.known import Secret
from flowbridge.hooks.secrets import plain
from flowbridge.hooks.signatures import Asked
from flowbridge.models.hooks import SCHEMES, Verification

NOW = 1_780_000_000
SECRET = "a secret of sixteen characters and more"
BODY = b'{"text": "\xc3\xbc"}'
WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SLACK_BODY = (
    b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&"
    b"channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&"
    b"response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&"
    b"trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
)
# Made by the senders: their documentation prints them.
DOCUMENTED: dict[str, tuple[str, str, bytes, dict[str, str], float]] = {
    "github": (  # docs.github.com, "Validating webhook deliveries", "Testing the webhook payload validation"
        "github",
        "It's a Secret to Everybody",
        b"Hello, World!",
        {"x-hub-signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"},
        NOW,
    ),
    "slack": (  # api.slack.com, "Verifying requests from Slack"
        "slack",
        "8f742231b10e8888abcd99yyyzzz85a5",
        SLACK_BODY,
        {
            "x-slack-signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
            "x-slack-request-timestamp": "1531420618",
        },
        1_531_420_620,
    ),
    "standard-webhooks": (  # the specification's, "Verifying signatures"
        "standard-webhooks",
        WHSEC,
        b'{"test": 2432232314}',
        {
            "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "webhook-timestamp": "1614265330",
            "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        },
        1_614_265_330,
    ),
}


def wrong(
    verification: Verification | str,
    headers: Mapping[str, str],
    body: bytes = BODY,
    *,
    secrets: tuple[str, ...] = (SECRET,),
    token: str = "",
    now: float = NOW,
) -> str:
    verification = Verification(verification) if isinstance(verification, str) else verification
    return signatures.wrong(verification, [plain(each) for each in secrets], Asked(headers, token), body, now)


def made(before: str = "", secret: str = SECRET, body: bytes = BODY) -> str:
    return hmac.new(secret.encode(), before.encode() + body, hashlib.sha256).hexdigest()


def in_base64(before: str = "", secret: str = SECRET) -> str:
    return base64.b64encode(hmac.new(secret.encode(), before.encode() + BODY, hashlib.sha256).digest()).decode()


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


OWN = Verification("hmac", header="X-Shop-Hmac", encoding="base64")
TIMED = Verification("hmac", header="X-Sig", prefix="sha256=", timestamp_header="X-When")
GRAFANA = Verification("grafana", timestamp_header="X-Grafana-Time")
Sign = Callable[[str], dict[str, str]]  # a secret → the headers of a request at NOW
SIGNERS: dict[str, tuple[Verification, Sign]] = {
    "github": (Verification("github"), lambda key: {"x-hub-signature-256": f"sha256={made(secret=key)}"}),
    "gitea": (Verification("gitea"), lambda key: {"x-gitea-signature": made(secret=key)}),
    "forgejo": (Verification("gitea"), lambda key: {"x-forgejo-signature": made(secret=key)}),
    "gitea-as-github": (Verification("gitea"), lambda key: {"x-hub-signature-256": f"sha256={made(secret=key)}"}),
    "grafana": (Verification("grafana"), lambda key: {"x-grafana-alerting-signature": made(secret=key)}),
    "grafana-timed": (
        GRAFANA,
        lambda key: {"x-grafana-alerting-signature": made(f"{NOW}:", key), "x-grafana-time": str(NOW)},
    ),
    "slack": (
        Verification("slack"),
        lambda key: {"x-slack-signature": f"v0={made(f'v0:{NOW}:', key)}", "x-slack-request-timestamp": str(NOW)},
    ),
    "stripe": (Verification("stripe"), lambda key: {"stripe-signature": f"t={NOW},v1={made(f'{NOW}.', key)},v0=old"}),
    "pagerduty": (
        Verification("pagerduty"),
        lambda key: {"x-pagerduty-signature": f"v1={made(secret='another one')},v1={made(secret=key)}"},
    ),
    "sentry": (Verification("sentry"), lambda key: {"sentry-hook-signature": made(secret=key)}),
    "hmac": (OWN, lambda key: {"x-shop-hmac": in_base64(secret=key)}),
    "hmac-timed": (TIMED, lambda key: {"x-sig": f"sha256={made(f'{NOW}.', key)}", "x-when": str(NOW)}),
    "hmac-timed-by-colon": (TIMED, lambda key: {"x-sig": f"sha256={made(f'{NOW}:', key)}", "x-when": str(NOW)}),
    "hmac-timed-in-ms": (TIMED, lambda key: {"x-sig": f"sha256={made(f'{NOW}000.', key)}", "x-when": f"{NOW}000"}),
}
each = pytest.mark.parametrize("name", SIGNERS)
TIMES = {"grafana-timed", "slack", "stripe", "hmac-timed", "hmac-timed-by-colon", "hmac-timed-in-ms"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_senders_document_is_right(name: str) -> None:
    scheme, secret, body, headers, now = DOCUMENTED[name]
    assert wrong(scheme, headers, body, secrets=(secret,), now=now) == ""
    assert wrong(scheme, headers, body + b" ", secrets=(secret,), now=now) != ""


@each
def test_right_signature_is_taken_and_any_other_is_not(name: str) -> None:
    verification, sign = SIGNERS[name]
    headers = sign(SECRET)
    assert wrong(verification, headers) == ""
    assert wrong(verification, headers, BODY + b" ").endswith("another secret, or another body")
    assert wrong(verification, sign("another secret of enough characters")).endswith("another secret, or another body")
    assert wrong(verification, {}).endswith("is missing")


@each
def test_both_secrets_hold_while_one_is_replaced(name: str) -> None:
    verification, sign = SIGNERS[name]
    both = ("the new secret, which is long enough", "the old secret, which is long enough")
    assert [wrong(verification, sign(secret), secrets=both) for secret in both] == ["", ""]
    assert wrong(verification, sign(SECRET), secrets=both) != ""


@each
def test_time_counts_where_it_is_signed(name: str) -> None:
    verification, sign = SIGNERS[name]
    for seconds in (-300, 300):
        assert wrong(verification, sign(SECRET), now=NOW + seconds) == ""
    for seconds in (-302, 302, 86_400):
        found = wrong(verification, sign(SECRET), now=NOW + seconds)
        assert found.endswith("is more than 300 s away from now") if name in TIMES else found == "", found


@each
def test_signed_hook_takes_no_bare_token(name: str) -> None:
    verification, _ = SIGNERS[name]
    for value in (f"Bearer {SECRET}", basic(f"x:{SECRET}")):
        assert wrong(verification, {"authorization": value, "x-gitlab-token": SECRET}, token=SECRET) != ""


@each
def test_secret_without_its_text_is_no_key(name: str) -> None:
    verification, sign = SIGNERS[name]
    digest = Secret(hashlib.sha256(SECRET.encode()).digest())
    assert signatures.wrong(verification, [digest], Asked(sign("")), BODY, NOW) != ""


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        pytest.param({}, SECRET, id="path"),
        pytest.param({"authorization": f"Bearer {SECRET}"}, "", id="bearer"),
        pytest.param({"authorization": f"bearer  {SECRET}"}, "", id="bearer-as-others-write-it"),
        pytest.param({"authorization": basic(f"anybody:{SECRET}")}, "", id="basic"),
        pytest.param({"authorization": basic(f":{SECRET}")}, "", id="basic-without-a-name"),
        pytest.param({"x-gitlab-token": SECRET}, "", id="gitlab"),
        pytest.param({"authorization": "Bearer of-a-proxy"}, SECRET, id="beside-what-a-proxy-adds"),
    ],
)
def test_token_may_stand_where_its_sender_can_put_it(headers: dict[str, str], token: str) -> None:
    assert wrong("token", headers, token=token) == ""
    assert wrong("token", headers, token=token, secrets=(SECRET[:-1],)) == "the token is wrong, or missing"
    assert signatures.has_token(
        Verification(), [plain("old secret, long enough"), plain(SECRET)], Asked(headers, token)
    )


def test_gitlab_sends_its_token_or_signs_with_another_one() -> None:
    assert wrong("gitlab", {"x-gitlab-token": SECRET}) == ""
    assert wrong("gitlab", {"x-gitlab-token": "no"}) == "X-Gitlab-Token is wrong, or missing"
    assert wrong("gitlab", {}, token=SECRET) != ""
    headers = standard(WHSEC)
    now = float(headers["webhook-timestamp"])
    assert wrong("gitlab", {**headers, "x-gitlab-token": "what else is set"}, secrets=(WHSEC,), now=now) == ""
    assert wrong("gitlab", headers, secrets=(SECRET, WHSEC), now=now) == ""  # from one to the other
    # A signing token is never sent, so whoever shows it has read it somewhere.
    assert wrong("gitlab", {"x-gitlab-token": WHSEC}, secrets=(WHSEC,)) == "webhook-signature is missing"


def standard(secret: str, body: bytes = BODY) -> dict[str, str]:
    """Signed by the library of Standard Webhooks."""
    at = datetime.now(UTC)
    made = Webhook(secret).sign("msg_1", at, body.decode())
    return {"webhook-id": "msg_1", "webhook-timestamp": str(int(at.timestamp())), "webhook-signature": made}


def test_standard_webhooks_is_what_its_library_signs() -> None:
    headers = standard(WHSEC)
    assert wrong("standard-webhooks", headers, secrets=(WHSEC,), now=time.time()) == ""
    other = f"v1,{base64.b64encode(b'x' * 32).decode()} v1a,of-an-asymmetric-key {headers['webhook-signature']}"
    assert wrong("standard-webhooks", {**headers, "webhook-signature": other}, secrets=(WHSEC,), now=time.time()) == ""
    for name in ("webhook-id", "webhook-timestamp"):
        changed = {**headers, name: "1" + headers[name]}
        assert wrong("standard-webhooks", changed, secrets=(WHSEC,), now=time.time()) != ""
        assert wrong("standard-webhooks", {**headers, name: ""}, secrets=(WHSEC,), now=time.time()) != ""


@pytest.mark.parametrize("time_", ["", "x", "-1", "1e9", "١٧٨", " ", f"{NOW}.0", "9" * 14, "9" * 5_000])
@pytest.mark.parametrize("name", sorted(TIMES))
def test_malformed_time_is_wrong(name: str, time_: str) -> None:
    verification, sign = SIGNERS[name]
    headers = sign(SECRET)
    for header, value in headers.items():
        changed = (
            {**headers, header: value.replace(str(NOW), time_)} if header != "x-when" else {**headers, header: time_}
        )
        if changed != headers:
            assert wrong(verification, changed) != ""


_TEXT = st.text(st.characters(max_codepoint=255), max_size=60)
_HEADER = st.one_of(
    _TEXT, st.sampled_from(["v1=", "t=,v1=", "sha256=", "v1,", "v1, v1,", "Basic =", "Basic ////", "Bearer", ","])
)
_NAMES = [
    *("authorization", "x-gitlab-token", "x-hub-signature-256", "x-gitea-signature", "x-forgejo-signature"),
    *("x-grafana-alerting-signature", "x-grafana-time", "x-slack-signature", "x-slack-request-timestamp"),
    *("stripe-signature", "x-pagerduty-signature", "sentry-hook-signature", "x-sig", "x-when"),
    *("webhook-id", "webhook-timestamp", "webhook-signature"),
]
_ALL = [*map(Verification, SCHEMES), OWN, TIMED, GRAFANA]


@given(st.sampled_from(_ALL), st.dictionaries(st.sampled_from(_NAMES), _HEADER), _TEXT, st.binary(max_size=40))
def test_headers_of_any_kind_are_wrong_and_raise_nothing(
    verification: Verification, headers: dict[str, str], token: str, body: bytes
) -> None:
    for secret in (SECRET, "whsec_not base64", WHSEC):
        assert wrong(verification, headers, body, secrets=(secret,), token=token) != ""
    assert signatures.wrong(verification, [], Asked(headers, token), body, NOW) != ""


@pytest.mark.parametrize("verification", _ALL)
def test_every_refusal_makes_as_many_hashes(monkeypatch: pytest.MonkeyPatch, verification: Verification) -> None:
    """So that its time tells nothing of whether there is such a hook, nor of how it is verified."""
    bodies: list[int] = []
    check: Any = signatures._Check
    inner = check._hmac
    monkeypatch.setattr(check, "_hmac", lambda self, key, before: bodies.append(1) or inner(self, key, before))
    for secrets in ((), (SECRET,), (SECRET, SECRET[::-1])):
        bodies.clear()
        assert wrong(verification, {}, secrets=secrets) != ""
        assert len(bodies) == signatures.LEAST_WORK
    name = next((name for name, (known, _) in SIGNERS.items() if known == verification and name != "hmac-timed"), "")
    if name and verification is not TIMED:
        bodies.clear()
        assert wrong(verification, SIGNERS[name][1]("another secret of enough characters")) != ""
        assert len(bodies) == signatures.LEAST_WORK


def test_table_has_every_scheme() -> None:
    assert {*signatures.SCHEMES, "token", "gitlab"} == set(SCHEMES)
