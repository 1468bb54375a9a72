"""Access tokens to which the real homeserver answers 500: a 401 here, on every path."""

import base64

import httpx
import pytest

from flowbridge.cli.demo.synapse import LocalSynapse

BROKEN = [
    "None",
    "NULL",
    "NaN",
    "N/A",
    "{}",
    "[]",
    "=",
    "...",
    base64.urlsafe_b64encode(b"000cvid abc\n").decode(),  # a macaroon whose third party is of no caveat
    base64.urlsafe_b64encode(b"000flocation x\n0").decode(),
    base64.urlsafe_b64encode(b"\2\xff\xff").decode(),  # a macaroon of version 2 whose first number has no end
]
PATHS = [
    ("POST", "/rooms/!r:localhost/send/m.room.message"),
    ("GET", "/rooms"),
    ("GET", "/deliveries"),
    ("GET", "/whoami"),
    ("GET", "/_matrix/client/v3/account/whoami"),
    ("GET", "/_matrix/client/v3/sync?timeout=0"),
    ("GET", "/_matrix/client/v3/pushrules/"),
]


@pytest.mark.parametrize("token", BROKEN)
def test_token_that_makes_the_homeserver_fail_is_a_401(anyone: httpx.Client, synapse: LocalSynapse, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    direct = httpx.get(f"{synapse.url}/_matrix/client/v3/account/whoami", headers=headers, trust_env=False)
    assert direct.status_code == 500, "the homeserver has learnt to refuse it"
    for method, path in PATHS:
        body = {"msgtype": "m.text", "body": "x"} if method == "POST" else None
        answer = anyone.request(method, path, headers=headers, json=body)
        assert (answer.status_code, answer.json()["errcode"]) == (401, "M_UNKNOWN_TOKEN"), f"{path}: {answer.text}"
