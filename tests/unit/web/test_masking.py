"""Paths as they may be logged."""

import pytest

from flowbridge.web.masking import masked


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/hooks/alerts", "/hooks/alerts"),
        ("/hooks/alerts/fh_secret", "/hooks/alerts/***"),
        ("/hooks/alerts/secret/more/", "/hooks/alerts/***/***/"),
        ("/hooks/alerts/requests/17", "/hooks/alerts/requests/17"),
        ("/hooks/alerts/preview", "/hooks/alerts/preview"),
        ("/hooks/alerts/previews", "/hooks/alerts/***"),
        ("/hooks/alerts/test/secret", "/hooks/alerts/***/***"),
        ("/hooks/alerts/requests/secret", "/hooks/alerts/***/***"),
        ("/relay/hooks/alerts/secret", "/relay/hooks/alerts/***"),
        ("/x/webhook/secret", "/x/webhook/***"),
        ("/_matrix/x/fh_secret", "/_matrix/x/***"),
        ("/rooms/!r/state/hooks/x", "/rooms/!r/state/hooks/x"),
        ("/hooks/secret", "/hooks/***"),
        ("/hooks/secret/preview", "/hooks/***/preview"),
        ("/hooks", "/hooks"),
        ("/hooks/", "/hooks/"),
        ("/hooks//secret", "/hooks//***"),
        ("/HOOKS/alerts/secret", "/HOOKS/alerts/***"),
        ("/hook/alerts/secret", "/hook/alerts/***"),
        ("/hooks%2Falerts%2Fsecret", "/hooks/alerts/***"),
        ("/webhook/secret", "/webhook/***"),
        ("/webhooks/secret", "/webhooks/***"),
        ("/api/v1/matrix/hook/secret", "/api/v1/matrix/hook/***"),
        ("/services/T0/B0/secret", "/services/***/***/***"),
        ("/api/webhooks/17/secret/slack", "/api/webhooks/17/***/***"),
        ("/elsewhere/fh_secret", "/elsewhere/***"),
        ("/elsewhere/%66h_secret", "/elsewhere/***"),
        ("/deliveries/17", "/deliveries/17"),
        ("/healthz", "/healthz"),
        ("", ""),
    ],
)
def test_path_is_shown_without_tokens(path: str, shown: str) -> None:
    assert masked(path, lambda name: name == "alerts") == shown
