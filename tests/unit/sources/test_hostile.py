"""Hostile values in every text of every recorded body: rooms see them as texts, and nobody is pinged by them."""

import copy
import json
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest

from flowbridge.rendering import cleaning
from flowbridge.rendering.webhooks import webhook
from flowbridge.sources import BY_NAME
from tests.unit.rendering.test_formats import HOSTILE, Shown, check_harmless
from tests.unit.sources.test_alerting import PAYLOADS

PINGS = ("@room", "@al:hs", "<!channel>", "<!here|here>", "<@U024BE7LH>", "@everyone")
FOLDERS = {"mattermost": "slack", "msteams": "teams", "hookshot": "generic", "appservice-webhooks": "generic"}
RECORDED = [str(file.relative_to(PAYLOADS).with_suffix("")) for file in sorted(PAYLOADS.glob("*/*.json"))]
# Who wrote these meant them as HTML: they are cleaned, not escaped.
MEANT = {"hookshot/text-html-username": ("html",), "appservice-webhooks/html": ("text",)}
MARK = "qqmark"  # at the end of each snippet, so that it can be found again

# Sources for which a folder's bodies are made, by the folder's name where that is one; the summary for all others.
Path = tuple[str | int, ...]


def source_of(name: str) -> str:
    folder = name.partition("/")[0]
    found = FOLDERS.get(folder, folder)
    return found if found in BY_NAME else "generic"


def headers_of(name: str) -> dict[str, str]:
    if name.endswith("/"):
        return {}
    folder, _, file = name.partition("/")
    kind = json.loads((PAYLOADS / f"{name}.json").read_text()).get("object_kind", "push")
    event = {"push-new-branch": "push"}.get(file, "")
    if folder == "github":
        event = event or next(
            event
            for event in ("issue_comment", "issues", "ping", "pull_request", "push", "release", "security_advisory",
                          "workflow_job", "workflow_run")
            if file.replace("-", "_").startswith(event)
        )  # fmt: skip
    if folder == "gitea":
        event = {"issues-opened": "issues", "pull-request": "pull_request"}.get(file, file)
    return {
        "github": {"x-github-event": event},
        "gitea": {"x-gitea-event": event, "x-github-event": event},
        "gitlab": {"x-gitlab-event": f"{kind.replace('_', ' ').title()} Hook"},
        "sentry": {"sentry-hook-resource": "issue"} if file == "issue-created" else {},
    }.get(folder, {})


def texts(value: Any, above: Path = ()) -> Iterator[Path]:
    """The places of all texts."""
    if isinstance(value, str):
        yield above
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from texts(item, (*above, key))


def put(payload: Any, path: Path, text: str) -> None:
    for key in path[:-1]:
        payload = payload[key]
    payload[path[-1]] = text


def recorded(name: str) -> Any:
    payload = json.loads((PAYLOADS / f"{name}.json").read_text())
    if name == "discord/embeds":
        payload["content"] = "down"  # less its @here, which asks for all
    return payload


def shown(name: str, payload: Any, template: dict[str, str] | None = None) -> list[dict[str, Any]]:
    given = {
        "source": source_of(name),
        "headers": headers_of(name),
        "per": "notification",
        "template": template,
        "is_text": False,
        "plain": False,
    }
    found = json.loads(webhook(json.dumps(payload), given)[0])
    assert not [each for each in found.get("warnings", ()) if "cannot be read" in each], found["warnings"]
    assert not [each for each in found.get("warnings", ()) if "template failed" in each], found["warnings"]
    messages: list[dict[str, Any]] = found.get("messages", [])
    return messages


def check(message: dict[str, Any], snippet: str, tags_of_the_source: set[str]) -> None:
    html = message["html"] or ""
    check_harmless(html)
    for tag, _ in Shown(html).tags:
        assert tag in tags_of_the_source, f"<{tag}> comes of {snippet}"
    assert "mentions" not in message["members"]
    # What is not HTML is the text as it was sent.
    if MARK in message["body"]:
        assert MARK in html or not html
    assert cleaning.clean(html) == html


# What our own templates and converters make; of the snippets, `b`, `i`, `font` … are none of these.
OURS = {
    *("p", "br", "a", "strong", "em", "del", "code", "pre", "ul", "ol", "li", "blockquote", "hr", "h1", "h2", "h3"),
    *("h4", "table", "tbody", "thead", "tr", "td", "th", "span", "details", "summary"),
}
MADE_BY_SNIPPETS = {"b", "i", "img", "div", "u", "s", "sup", "sub", "caption"}


def test_no_snippet_makes_tags_of_ours() -> None:
    assert not OURS & MADE_BY_SNIPPETS


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in MEANT])
def test_hostile_texts_are_shown_as_texts(name: str) -> None:
    """One after another in each text alone; and each in all texts at once."""
    payload = recorded(name)
    places = list(texts(payload))
    for number, path in enumerate(places):
        snippet = HOSTILE[number % len(HOSTILE)] + MARK
        changed = copy.deepcopy(payload)
        put(changed, path, snippet)
        for message in shown(name, changed):
            check(message, snippet, OURS)
    for snippet in HOSTILE:
        changed = copy.deepcopy(payload)
        for path in places:
            put(changed, path, snippet + MARK)
        for message in shown(name, changed):
            check(message, snippet, OURS)


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in MEANT])
def test_hostile_title_is_whole_in_the_text(name: str) -> None:
    """What is shown of a value is all of it: nothing is eaten as a tag."""
    payload = recorded(name)
    seen = 0
    for path in texts(payload):
        changed = copy.deepcopy(payload)
        put(changed, path, f"<b>x</b> & <i y> {MARK}")
        for message in shown(name, changed):
            if f" {MARK}" in message["body"]:  # in an address it is percent-encoded
                seen += 1
                assert "<b>x</b> & <i y>" in message["body"].replace("\\", "")
                assert "<b>x</b> & <i y>" in unescape(message["html"] or message["body"])
    assert seen or not shown(name, payload)


@pytest.mark.parametrize("name", MEANT)
def test_html_that_is_meant_is_cleaned(name: str) -> None:
    payload = recorded(name)
    for snippet in HOSTILE:
        for path in texts(payload):
            changed = copy.deepcopy(payload)
            put(changed, path, snippet + MARK)
            for message in shown(name, changed):
                check(message, snippet, OURS | MADE_BY_SNIPPETS)


@pytest.mark.parametrize("name", RECORDED)
def test_no_text_pings(name: str) -> None:
    """What asks for all in Slack or Discord is a member, which the hook's `mentions` lets through or not."""
    payload = recorded(name)
    for ping in PINGS:
        changed = copy.deepcopy(payload)
        for path in texts(payload):
            put(changed, path, f"{ping} x")
        for message in shown(name, changed):
            is_slack = ping.startswith("<!") and (source_of(name) == "slack" or name.startswith("appservice"))
            is_discord = ping == "@everyone" and source_of(name) == "discord"
            assert message["members"].get("mentions") in ([["@room"], None] if is_slack or is_discord else [None])
            assert "matrix.to" not in (message["html"] or "")


TEMPLATE = {
    "html": """
{% for k, v in payload|items %}
<li>{{ k }}: {{ v }} {{ v|link }} {{ v|code }} {{ v|truncate(50) }}</li>
{% endfor %}
{{ payload|tojson }} {{ 'x'|link(payload) }} {{ payload|breaks }}
"""
}
MARKDOWN = {
    "markdown": """
# {{ payload }}
{% for k, v in payload|items %}
- **{{ k }}** {{ v }} {{ v|code }} {{ v|link }}
{% endfor %}
"""
}


@pytest.mark.parametrize("template", [TEMPLATE, MARKDOWN], ids=["html", "markdown"])
def test_templates_of_hooks_escape(template: dict[str, str]) -> None:
    for snippet in HOSTILE:
        payload = {
            "a": f"{snippet}{MARK}",
            f"{snippet}{MARK}": "b",
            "c": {"d": [f"{snippet}{MARK}"]},
            "e": "__init__ 5*3*2",
        }
        (message,) = shown("generic/", payload, template)
        check(message, snippet, OURS)
        assert message["body"].count(MARK) >= 7
        assert "\\<" not in message["body"]  # what Markdown needed is not in the text


@pytest.mark.parametrize("source", [name for name, each in BY_NAME.items() if each.sample is not None])
def test_name_of_an_event_is_short(source: str) -> None:
    """It is kept beside the last requests, whose bodies are cut."""
    sample, headers = BY_NAME[source].sample, BY_NAME[source].sample_headers
    for path in texts(sample):
        payload = copy.deepcopy(sample)
        put(payload, path, "\ud800" + "x" * 30_000)
        given = {"source": source, "headers": headers, "per": "notification", "template": None, "is_text": False}
        made = json.loads(webhook(json.dumps(payload), {**given, "plain": False})[0])
        assert sum(len(made.get(name, "")) for name in ("event", "nothing", "wrong")) <= 600
        assert all(len(each["event"]) <= 200 for each in made.get("messages", ()))
        json.dumps(made, ensure_ascii=False).encode()
