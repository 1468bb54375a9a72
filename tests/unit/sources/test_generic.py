# ruff: noqa: E501 (bodies, and what is shown of them, side by side)
"""Anything that can POST: the keys of a message, other bridges' keys, else a summary."""

import json
from typing import Any

import pytest

from flowbridge.events import message
from flowbridge.sources import generic
from tests.unit.sources.test_alerting import made, only
from tests.unit.sources.test_chat import said


def test_keys_are_those_of_a_message() -> None:
    assert generic.KEYS == message.KEYS


@pytest.mark.parametrize(
    ("payload", "body", "html", "members"),
    [
        ({"text": "a *b* <c>"}, "a *b* <c>", None, {}),
        ({"markdown": "a *b*"}, "a *b*", "a <em>b</em>", {}),
        ({"html": "a <b>b</b><script>x</script>"}, "a b", "a <b>b</b>", {}),
        ("just text", "just text", None, {}),
        (42, "42", None, {}),
        ({"payload": "of a flow"}, "of a flow", None, {}),
        ({"payload": {"text": "of a flow"}, "topic": "t"}, "of a flow", None, {}),
        ({"text": "x", "unknown": {"a": 1}, "title": "T", "msgtype": "m.notice"}, "x", None, {"title": "T", "msgtype": "m.notice"}),
        ({"text": "x", "key": "k", "on_update": "thread", "thread": "$t:hs", "reply_to": "$r:hs"}, "x", None,
         {"key": "k", "on_update": "thread", "thread": "$t:hs", "reply_to": "$r:hs"}),
        ({"text": "x", "mentions": ["@a:hs"], "overflow": "file"}, "x", None, {"mentions": ["@a:hs"], "overflow": "file"}),
        ({"text": "x", "edit": "$e:hs", "key": "k", "thread": "$t:hs"}, "x", None, {"edit": "$e:hs"}),
        # what is of a wrong type is left out
        ({"text": "x", "title": 5, "key": 7, "mentions": {"a": 1}, "on_update": "never", "msgtype": "m.image"}, "x", None,
         {"title": "5", "key": "7"}),
        ({"text": None, "html": "", "markdown": "x"}, "x", None, {}),
        ({"text": "x", "title": "one\ntwo " + "y" * 600}, "x", None, {"title": "one two " + "y" * 492}),
        # matrix-hookshot
        ({"text": "t", "html": "<i>h</i>"}, "h", "<i>h</i>", {}),
        ({"text": "t\n<b>", "username": "U & V"}, "U & V: t\n<b>", "<strong>U &amp; V:</strong> t<br>&lt;b&gt;", {}),
        ({"html": "<p>h</p>", "username": "U"}, "U\n\nh", "<p><strong>U</strong></p><p>h</p>", {}),
        ({"markdown": "*m*", "username": "a_b_"}, "**a\\_b\\_:** *m*", "<strong>a_b_:</strong> <em>m</em>", {}),
        # matrix-appservice-webhooks
        ({"text": "<i>h</i>", "format": "html", "displayName": "D", "msgtype": "notice"}, "D\n\nh",
         "<p><strong>D</strong></p><i>h</i>", {"msgtype": "m.notice"}),
        ({"text": "<i>h</i> :fire:", "format": "plain", "emoji": True, "msgtype": "emote"}, "<i>h</i> 🔥", None, {"msgtype": "m.emote"}),
        ({"text": ":fire:", "avatarUrl": "https://x/", "msgtype": "plain"}, ":fire:", None, {}),
        # Slack's, wherever it arrives
        ({"text": "<https://x/|x> :fire:"}, "x (https://x/) 🔥", '<a href="https://x/">x</a> 🔥', {}),
        ({"attachments": [{"text": "*b*"}]}, "b", "<strong>b</strong>", {}),
        ({"attachments": [{"url": "https://x/f.pdf", "text": "t"}, 5, {"other": 1}]}, "", None,
         {"attachments": [{"url": "https://x/f.pdf", "text": "t"}]}),
    ],
)  # fmt: skip
def test_message_is_read(payload: Any, body: str, html: str | None, members: dict[str, Any]) -> None:
    found = said(payload, "generic")
    assert (found["body"], found["html"], found["members"]) == (body, html, members)


@pytest.mark.parametrize(
    "payload", [{"status": "down"}, [1, {"a": "b"}], {"text": {"a": 1}}, {"text": ""}, {"payload": {"a": 1}}]
)
def test_other_json_is_summarised(payload: Any) -> None:
    found = only(made(json.dumps(payload)))
    assert found["body"]
    assert found["members"] == {}


@pytest.mark.parametrize("payload", [None, "", " ", [], {}, {"a": None}, {"text": "", "b": []}])
def test_nothing_is_said_to_be_nothing(payload: Any) -> None:
    assert said(payload, "generic")["body"] == "An empty request."


def test_text_that_is_no_json_is_the_message() -> None:
    given: dict[str, Any] = {
        "source": "auto",
        "headers": {},
        "per": "notification",
        "template": None,
        "is_text": True,
        "plain": False,
    }
    from flowbridge.rendering.webhooks import webhook

    assert only(json.loads(webhook("{not json", given)[0]))["body"] == "{not json"
