"""No JSON, however far from what chat tools document, may stop their sources, or take long."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.sources import BY_NAME
from tests.unit.sources.test_alerting import body, made
from tests.unit.sources.test_chat import DIALECTS, FOLDERS, RECORDED
from tests.unit.sources.test_mutations import OTHERS, paths, read, replaced, without

SOURCES = (*DIALECTS, "generic")


def _source(name: str) -> str:
    return FOLDERS[name.partition("/")[0]]


@pytest.mark.parametrize("name", RECORDED)
def test_no_other_value_at_any_place_stops_a_source(name: str) -> None:
    payload = json.loads(body(name))
    for path in paths(payload):
        for other in OTHERS:
            for source in (_source(name), "generic"):
                read(source, replaced(payload, path, other), {})
        if path:
            read(_source(name), without(payload, path), {})


@pytest.mark.parametrize("name", RECORDED)
def test_what_a_mutated_body_says_can_be_shown(name: str) -> None:
    payload = json.loads(body(name))
    for number, path in enumerate(paths(payload)):
        for shift in range(3):
            other = OTHERS[(number + 7 * shift) % len(OTHERS)]
            found = made(json.dumps(replaced(payload, path, other)), source=_source(name))
            if "wrong" in found:
                assert found["wrong"].startswith("has nothing to show: it needs")
                continue
            assert found["warnings"] == [], (path, other)
            assert all(each["body"].strip() for each in found["messages"])


_WORDS = (
    *("text", "blocks", "attachments", "type", "elements", "fields", "title", "value", "url", "accessory", "style"),
    *(
        "content",
        "embeds",
        "name",
        "footer",
        "author",
        "timestamp",
        "description",
        "sections",
        "facts",
        "body",
        "items",
    ),
    *("columns", "actions", "rows", "cells", "message", "tags", "priority", "click", "attach", "extras", "username"),
    *("client::display", "contentType", "client::notification", "bigImageUrl", "card", "cards", "cardsV2", "widgets"),
    *("html", "markdown", "mentions", "key", "edit", "thread", "format", "payload", "icon_emoji", "potentialAction"),
)
_KINDS = (
    *("section", "header", "context", "image", "actions", "input", "divider", "rich_text", "rich_text_list", "table"),
    *("link", "emoji", "date", "mrkdwn", "plain_text", "AdaptiveCard", "TextBlock", "FactSet", "Container", "Table"),
    *("ColumnSet", "ActionSet", "Image", "RichTextBlock", "CodeBlock", "Action.OpenUrl", "MessageCard", "video"),
    *("https://x.example/", ":fire:", "*a* <https://x.example/|b>", "<!channel>", "<t:1:R>"),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(_KINDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=6),
    max_leaves=30,
)


@pytest.mark.parametrize("source", SOURCES)
@given(
    payload=_JSON,
    headers=st.dictionaries(st.sampled_from(["x-title", "x-tags", "t", "content-type"]), st.text(max_size=9)),
)
def test_no_json_stops_a_source(source: str, payload: Any, headers: dict[str, str]) -> None:
    read(source, payload, headers)


@pytest.mark.parametrize("source", SOURCES)
def test_time_grows_with_the_body_not_its_square(source: str) -> None:
    """A body of a megabyte: each list of it long, each text long."""
    sample = BY_NAME[source].sample

    def grown(value: Any, times: int) -> Any:
        if isinstance(value, dict):
            return {key: grown(item, times) for key, item in value.items()}
        if isinstance(value, list):
            return [grown(item, times) for item in value] * times
        return f"{value} *a* <b> `c` :fire: " * times if isinstance(value, str) and len(value) > 15 else value

    for payload in (grown(sample, 30), {**sample, "text": "*a* <" * 200_000, "message": "x\n" * 400_000}):
        begun = time.process_time()
        found = made(json.dumps(payload), source=source)
        assert time.process_time() - begun < 2  # it is 0.2 at most; the machine may be busy
        assert found.get("messages") or found["wrong"]
