# ruff: noqa: E501, ISC004 (bodies, and what is shown of them, side by side)
"""Chat tools' bodies: what rooms read of what senders of Slack, Discord, Teams, ntfy and Gotify send."""

import json
from typing import Any

import pytest

from flowbridge.sources import BY_NAME
from tests.unit.sources.test_alerting import GOLDEN, PAYLOADS, body, golden, made, only

FOLDERS = {
    "slack": "slack",
    "mattermost": "slack",
    "discord": "discord",
    "msteams": "teams",
    "ntfy": "ntfy",
    "gotify": "gotify",
    "hookshot": "generic",
    "appservice-webhooks": "generic",
}
DIALECTS = ("slack", "discord", "teams", "ntfy", "gotify")
RECORDED = [
    str(file.relative_to(PAYLOADS).with_suffix(""))
    for folder in FOLDERS
    for file in sorted((PAYLOADS / folder).glob("*.json"))
    if file.stem != "null-text"
]


def said(payload: Any, source: str, **headers: str) -> dict[str, Any]:
    """The one message that a body becomes."""
    return only(made(json.dumps(payload), source=source, **headers))


def shown(payload: Any, source: str, **headers: str) -> str:
    """Its HTML; its text, where it has no HTML."""
    message = said(payload, source, **headers)
    return str(message["html"] or message["body"])


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_body_is_shown_as_it_was_looked_at(name: str) -> None:
    found = made(body(name), source=FOLDERS[name.partition("/")[0]])
    message = only(found)
    assert found["warnings"] == []
    golden(GOLDEN / f"{name}.html", message["html"])
    golden(GOLDEN / f"{name}.txt", message["body"])


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_body_is_recognised(name: str) -> None:
    found = made(body(name))
    is_slack = name == "appservice-webhooks/slack-shaped"
    assert found["source"] == ("slack" if is_slack else FOLDERS[name.partition("/")[0]])
    assert only(found)["body"] == only(made(body(name), source=found["source"]))["body"]


@pytest.mark.parametrize("source", [*DIALECTS, "generic"])
def test_sample_is_shown_as_it_was_looked_at(source: str) -> None:
    sample = BY_NAME[source].sample
    found = made(json.dumps(sample), source=source)
    message = only(found)
    assert found["warnings"] == []
    golden(GOLDEN / source / "sample.html", message["html"])
    golden(GOLDEN / source / "sample.txt", message["body"])
    assert made(json.dumps(sample))["source"] == source


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("slack", "needs text, blocks or attachments that hold a text"),
        ("discord", "needs content, or embeds that hold a text"),
        ("teams", "needs text, sections, or an Adaptive Card that holds a text"),
        ("ntfy", "needs a message or a title"),
        ("gotify", "needs a message"),
    ],
)
def test_body_with_nothing_to_show_is_refused(source: str, needs: str) -> None:
    empty: list[Any] = [{}, [], None, 1, {"text": None}, {"text": " \n"}, {"content": "", "embeds": [None, {}]}]
    empty += [{"attachments": [{"content": {"type": "AdaptiveCard"}}]}, {"other": "x"}]
    empty += [{"blocks": [{"type": "divider"}]}] if source != "discord" else []  # which takes Slack's, too
    for payload in empty:
        assert made(json.dumps(payload), source=source) == {"wrong": f"has nothing to show: it {needs}"}


@pytest.mark.parametrize("source", DIALECTS)
def test_text_alone_is_a_message(source: str) -> None:
    assert said("it is <b>down</b> & out", source)["body"] == "it is <b>down</b> & out"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"text": "up", "username": "Bot <1>"}, "<strong>Bot &lt;1&gt;:</strong> up"),
        ({"text": "up", "icon_emoji": ":ghost:", "username": "Bot"}, "<strong>👻 Bot:</strong> up"),
        ({"text": "a\n\nb", "username": "Bot"}, "<p><strong>Bot</strong></p>\n<p>a</p>\n<p>b</p>"),
        ({"text": "*not* bold", "mrkdwn": False}, "*not* bold"),
        ({"text": "fallback", "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": "*b*"}}]}, "<strong>b</strong>"),
        ({"text": "shown", "blocks": [{"type": "divider"}, {"type": "unheard-of"}, None, 3]}, "shown"),
        ({"blocks": [{"type": "new", "text": {"type": "plain_text", "text": "a *b*"}}]}, "a *b*"),
        (
            {"blocks": [{"type": "actions", "elements": [
                {"type": "button", "text": {"type": "plain_text", "text": "Open"}, "url": "https://x.example/?a=1&b=2"},
                {"type": "button", "text": {"type": "plain_text", "text": "Does nothing here"}},
            ]}]},
            '<a href="https://x.example/?a=1&amp;b=2">Open</a>',
        ),
        (
            {"blocks": [{"type": "section", "fields": [
                {"type": "mrkdwn", "text": "*Host*\ndb-1"}, {"type": "mrkdwn", "text": "*State:* down"}, None,
            ]}]},
            "<ul><li><strong>Host</strong>: db-1</li><li><strong>State</strong>: down</li></ul>",
        ),
        (
            {"blocks": [{"type": "rich_text", "elements": [
                {"type": "rich_text_section", "elements": [
                    {"type": "text", "text": "a & "}, {"type": "text", "text": "b", "style": {"bold": True, "code": True}},
                    {"type": "link", "url": "https://x.example/?a&b", "text": "<l>"}, {"type": "emoji", "name": "fire"},
                    {"type": "user", "user_id": "U1"}, {"type": "channel", "channel_id": "C1"},
                    {"type": "date", "timestamp": 1700000000, "format": "{date}"},
                ]},
                {"type": "rich_text_list", "style": "ordered", "elements": [
                    {"type": "rich_text_section", "elements": [{"type": "text", "text": "one"}]}, None,
                ]},
                {"type": "rich_text_preformatted", "elements": [{"type": "text", "text": "x < y"}]},
                {"type": "rich_text_quote", "elements": [{"type": "text", "text": "q\nr"}]},
            ]}]},
            "<p>a &amp; <code><strong>b</strong></code>"
            '<a href="https://x.example/?a&amp;b">&lt;l&gt;</a>🔥@U1#C12023-11-14 22:13 UTC</p>\n'
            "<ol><li>one</li></ol>\n<pre><code>x &lt; y</code></pre>\n<blockquote>q<br>r</blockquote>",
        ),
        (
            {"blocks": [{"type": "table", "rows": [
                [{"type": "raw_text", "text": "a"}, {"type": "rich_text", "elements": [
                    {"type": "rich_text_section", "elements": [{"type": "text", "text": "b"}]}]}],
            ]}]},
            "<table><tbody><tr><td>a</td><td>b</td></tr></tbody></table>",
        ),
        (
            {"blocks": [{"type": "video", "title": {"type": "plain_text", "text": "Film"}, "title_url": "https://x.example/"}]},
            '<a href="https://x.example/">Film</a>',
        ),
        ({"attachments": [{"fallback": "only this"}]}, "only this"),
        ({"attachments": [{"fallback": "not this", "title": "T_a_b", "title_link": "https://x.example/"}]},
         '<strong><a href="https://x.example/">T_a_b</a></strong>'),
        ({"attachments": [{"text": "t", "footer": "f", "ts": "1700000000", "image_url": "https://x.example/i.png"}]},
         '<p>t</p>\n<p><a href="https://x.example/i.png">image</a></p>\n<p>f · 2023-11-14 22:13 UTC</p>'),
        ({"attachments": [{"blocks": [{"type": "header", "text": {"type": "plain_text", "text": "H"}}]}]}, "<strong>H</strong>"),
        (
            {"cardsV2": [{"card": {"header": {"title": "T & <b>"}, "sections": [{"header": "S", "widgets": [
                {"textParagraph": {"text": "a <b>b</b><br>c &lt;d&gt;"}},
                {"decoratedText": {"topLabel": "Host", "text": "db-1", "bottomLabel": "below"}},
                {"buttonList": {"buttons": [{"text": "Open", "onClick": {"openLink": {"url": "https://x.example/"}}}]}},
            ]}]}}]},
            "<p><strong>T &amp;</strong></p>\n<p><strong>S</strong></p>\n<p>a b<br>c &lt;d&gt;</p>\n"
            '<p><strong>Host</strong>: db-1</p>\n<p>below</p>\n<p><a href="https://x.example/">Open</a></p>',
        ),
    ],
)  # fmt: skip
def test_slack(payload: Any, expected: str) -> None:
    html = shown(payload, "slack")
    assert expected in (html, html.removeprefix("<p>").removesuffix("</p>"))


def test_everybody_is_mentioned_only_as_a_member() -> None:
    """Whether that pings is for the hook's `mentions` to say."""
    for text in ("<!channel> down", "<!here|here>", "a <!everyone>"):
        message = said({"text": text}, "slack")
        assert message["members"] == {"mentions": ["@room"]}
        assert "@room" not in message["body"]
    blocks = [{"type": "rich_text", "elements": [{"elements": [{"type": "broadcast", "range": "here"}]}]}]
    assert said({"blocks": blocks}, "slack")["members"] == {"mentions": ["@room"]}
    for text in ("@room @channel @here", "`<!channel>`", "```<!here>```", "<@U024BE7LH>", "&lt;!channel&gt;"):
        assert said({"text": text}, "slack")["members"] == {}
    quiet: list[dict[str, Any]] = [
        {"allowed_mentions": {"parse": []}},
        {"allowed_mentions": {}},
        {"content": "@room a@here"},
    ]
    for allowed in quiet:
        assert said({"content": "@everyone @here", **allowed}, "discord")["members"] == {}
    for asked in ({}, {"allowed_mentions": {"parse": ["everyone"]}}):
        message = said({"content": "@here: down", **asked}, "discord")
        assert (message["members"], message["body"]) == ({"mentions": ["@room"]}, "@here: down")
    assert said({"embeds": [{"description": "@everyone"}]}, "discord")["members"] == {}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"content": "a **b** <c>"}, "<p>a <strong>b</strong> &lt;c&gt;</p>"),
        ({"content": "x", "username": "Bot & Co"}, "<p><strong>Bot &amp; Co</strong></p>\n<p>x</p>"),
        ({"content": "<@123> <@&4> <#5> <:ok:6> <a:wave_2:7> <t:1700000000:R> :fire:"},
         "<p>@123 @4 #5 🆗 :wave_2: 2023-11-14 22:13 UTC 🔥</p>"),
        ({"embeds": [{"title": "T", "url": "https://x.example/", "footer": {"text": "F"}, "timestamp": "2023-11-14T22:13:20Z"}]},
         '<p><strong><a href="https://x.example/">T</a></strong></p>\n<p>F · 2023-11-14 22:13 UTC</p>'),
        ({"embeds": [{"url": "https://x.example/", "image": {"url": "https://x.example/i.png"}}]},
         '<p><a href="https://x.example/">https://x.example/</a></p>\n<p><a href="https://x.example/i.png">image</a></p>'),
        ({"embeds": [{"fields": [{"name": "Host:", "value": "`db-1`"}, {"name": "", "value": "b"}, {"name": "c"}, 5]}]},
         "<ul>\n<li><strong>Host</strong>: <code>db-1</code></li>\n<li>b</li>\n<li><strong>c</strong></li>\n</ul>"),
        ({"attachments": [{"pretext": "Slack's"}]}, "Slack's"),
    ],
)  # fmt: skip
def test_discord(payload: Any, expected: str) -> None:
    assert shown(payload, "discord") == expected


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"text": "a **b**<br>c"}, "<p>a <strong>b</strong><br>\nc</p>"),
        ({"@type": "MessageCard", "summary": "only this"}, "<p>only this</p>"),
        ({"@type": "MessageCard", "title": "T", "summary": "not this", "text": "x", "potentialAction": [
            {"@type": "OpenUri", "name": "Open", "targets": [{"os": "default", "uri": "https://x.example/"}]},
            {"@type": "ActionCard", "name": "no"}, None]},
         '<p><strong>T</strong></p>\n<p>x</p>\n<p><a href="https://x.example/">Open</a></p>'),
        ({"sections": [{"facts": [{"name": "Host:", "value": "db-1"}, {"name": "n", "value": None}, {}]}]},
         "<ul>\n<li><strong>Host</strong>: db-1</li>\n<li><strong>n</strong></li>\n</ul>"),
        ({"type": "AdaptiveCard", "body": [
            {"type": "ColumnSet", "columns": [
                {"type": "Column", "items": [{"type": "TextBlock", "text": "left"}]},
                {"type": "Column", "items": [{"type": "TextBlock", "text": "right"}]}]},
            {"type": "Container", "items": [{"type": "FactSet", "facts": [{"title": "a", "value": "b"}]}]},
            {"type": "TextBlock", "text": "hidden", "isVisible": False},
            {"type": "TextBlock", "text": "since {{DATE(2023-11-14T22:13:20Z, SHORT)}}"},
            {"type": "RichTextBlock", "inlines": ["x ", {"type": "TextRun", "text": "*y*"}]},
            {"type": "ActionSet", "actions": [{"type": "Action.OpenUrl", "title": "O", "url": "https://x.example/"}]},
            {"type": "Table", "rows": [{"cells": [{"items": [{"type": "TextBlock", "text": "c"}]}]}]}],
          "actions": [{"type": "Action.OpenUrl", "title": "P", "url": "https://y.example/"}, {"type": "Action.Submit"}]},
         "<p>left</p>\n<p>right</p>\n<ul>\n<li><strong>a</strong>: b</li>\n</ul>\n<p>since 2023-11-14T22:13:20Z</p>\n"
         '<p>x *y*</p>\n<p><a href="https://x.example/">O</a></p>\n<table>\n<tbody><tr><td>c</td></tr>\n</tbody></table>\n'
         '<p><a href="https://y.example/">P</a></p>'),
        ({"attachments": [{"contentType": "application/vnd.microsoft.card.hero", "content": {
            "title": "T", "text": "x", "buttons": [{"type": "openUrl", "title": "B", "value": "https://x.example/"}]}}]},
         '<p><strong>T</strong></p>\n<p>x</p>\n<p><a href="https://x.example/">B</a></p>'),
    ],
)  # fmt: skip
def test_teams(payload: Any, expected: str) -> None:
    assert shown(payload, "teams") == expected


@pytest.mark.parametrize(
    ("payload", "headers", "expected"),
    [
        ({"message": "m", "tags": ["fire", "db-1"]}, {}, "<p>🔥 m</p>\n<ul>\n<li><strong>Tags</strong>: db-1</li>\n</ul>"),
        ({"message": "a *b*\nc"}, {}, "<p>a *b*<br>c</p>"),
        ({"message": "a *b*", "markdown": True}, {}, "<p>a <em>b</em></p>"),
        ({"message": "m", "priority": 5, "click": "https://x.example/"}, {},
         '<p>m</p>\n<ul>\n<li><strong>Priority</strong>: urgent</li>\n</ul>\n<p><a href="https://x.example/">Open</a></p>'),
        ({"attach": "https://x.example/f.jpg"}, {}, '<p><a href="https://x.example/f.jpg">https://x.example/f.jpg</a></p>'),
        ({"message": "m", "actions": [{"action": "http", "label": "no", "url": "https://x.example/"}]}, {}, "<p>m</p>"),
        ("text", {"x_title": "T", "x_tags": "warning,db-1", "x_priority": "high", "x_click": "https://x.example/"},
         '<p><strong><a href="https://x.example/">⚠️ T</a></strong></p>\n<p>text</p>\n'
         "<ul>\n<li><strong>Priority</strong>: high</li>\n<li><strong>Tags</strong>: db-1</li>\n</ul>"),
        ("*b*", {"content_type": "text/markdown", "title": "=?UTF-8?B?w7w=?="}, "<p><strong>ü</strong></p>\n<p><em>b</em></p>"),
        ("x", {"title": "\u00c3\u00bc"}, "<p><strong>ü</strong></p>\n<p>x</p>"),
        ("x", {"title": "=?nope?B?w7w=?="}, "<p><strong>=?nope?B?w7w=?=</strong></p>\n<p>x</p>"),
    ],
)  # fmt: skip
def test_ntfy(payload: Any, headers: dict[str, str], expected: str) -> None:
    assert shown(payload, "ntfy", **headers) == expected


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"message": "a *b*\nc"}, "<p>a *b*<br>c</p>"),
        ({"message": "m", "title": "T", "priority": 10,
          "extras": {"client::notification": {"click": {"url": "https://x.example/"}, "bigImageUrl": "https://x.example/i"}}},
         '<p><strong><a href="https://x.example/">T</a></strong></p>\n<p>m</p>\n'
         '<ul>\n<li><strong>Priority</strong>: 10</li>\n</ul>\n<p><a href="https://x.example/i">image</a></p>'),
        ({"message": "m", "extras": {"client::notification": {"click": {"url": "https://x.example/"}}}},
         '<p>m</p>\n<p><a href="https://x.example/">Open</a></p>'),
    ],
)  # fmt: skip
def test_gotify(payload: Any, expected: str) -> None:
    assert shown(payload, "gotify") == expected


@pytest.mark.parametrize(
    ("payload", "shown_"),
    [
        ({"blocks": [{"type": "0x1f", "height": 7}], "chain": "main"}, "chain: main"),
        ({"content": "", "embeds": [{"vector": [1.5]}], "model": "m"}, "model: m"),
        ({"topic": "zigbee/door", "message": "open"}, "topic: zigbee/door"),
        ({"title": "T", "message": "m", "priority": "high"}, "priority: high"),
        ({"@type": "MessageCard", "id": "x", "level": "info"}, "level: info"),
    ],
)
def test_what_only_looks_like_a_chats_is_summed_up(payload: Any, shown_: str) -> None:
    """By `auto`: what no chat tool would show is no reason for a 400, which loses it."""
    found = made(json.dumps(payload))
    assert (found["source"], found["warnings"]) == ("generic", [])
    assert shown_ in only(found)["body"]
