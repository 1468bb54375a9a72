"""Texts that are too long for an event are cut, and say so."""

import contextlib
import json
import time
from typing import Any

import pytest

from flowbridge.rendering import fitting
from flowbridge.rendering.child import MAX_HOOK_OUTPUT
from flowbridge.rendering.cleaning import TooDeepError
from flowbridge.rendering.fitting import MAX_TEXT, size_of
from flowbridge.rendering.formats import RefusedError
from flowbridge.rendering.processes import Rendering
from flowbridge.rendering.webhooks import MAX_MESSAGES, webhook
from flowbridge.sources import BY_NAME
from flowbridge.sources.source import Incoming, Notice, Source


def alerts(count: int) -> str:
    items = "".join(
        f'<li><strong>alert {number}</strong>: <a href="https://x.example/{number}">it is down</a> on host-{number}'
        "<ul><li>severity: critical</li><li>team: db</li></ul></li>"
        for number in range(count)
    )
    return f"<p><strong>{count} alerts</strong></p><ul>{items}</ul><p>seen by prometheus</p>"


def fits(found: tuple[str, str | None], limit: int = MAX_TEXT) -> bool:
    body, html = found
    return 0 < size_of(body) + size_of(html or "") <= limit


def test_what_fits_stays() -> None:
    body, html = fitting.html(alerts(20), MAX_TEXT)
    assert "more" not in body
    assert "alert 19" in body
    assert html is not None


@pytest.mark.parametrize("count", [120, 1_000, 20_000])
def test_items_of_a_list_are_dropped_from_the_end(count: int) -> None:
    fitting.html(alerts(120), MAX_TEXT)  # what is made once is made
    begun = time.process_time()
    body, html = found = fitting.html(alerts(count), MAX_TEXT)
    took = time.process_time() - begun
    assert fits(found)
    shown = body.count("is down")
    assert 60 < shown < count
    assert f"- alert {shown - 1}: it is down (https://x.example/{shown - 1}) on host-{shown - 1}\n" in body
    assert body.endswith(f"\n- … and {count - shown} more\n\nseen by prometheus")
    assert (html or "").count("severity: critical") == shown
    assert took < 0.4  # it is 0.015 for 1,000; the machine may be busy


def test_each_list_says_how_many_of_its_items_are_missing() -> None:
    item = f"<li>{'x' * 90}</li>"
    body, _ = fitting.html(f"<p>firing</p><ul>{item * 130}</ul><p>resolved</p><ol>{item * 7}</ol>", MAX_TEXT)
    kept = body.count("xxx" * 30)
    assert f"- … and {130 - kept} more\n\nresolved\n\n1. … and 7 more" in body


@pytest.mark.parametrize(
    "html",
    [
        f"<p>{'<b>word</b> ' * 10_000}</p>",
        "<p>" + "x y " * 50_000,
        "<ul><li>" + "one item, too long " * 3_000,
        "<ul><li>" * 40 + "x" * 100_000,
        "&amp;" * 50_000,
        "\x01" * 50_000,
        "漢" * 50_000,
        "<pre>" + "a\n" * 50_000 + "</pre>",
        "<b><i><u>" * 30 + "word " * 20_000,
        "<table>" + "<tr><td>a</td></tr>" * 9_000 + "</table>",
        "<blockquote>" * 90 + "line<br>" * 9_000,
    ],
    ids=lambda html: html[:12],
)
@pytest.mark.parametrize("limit", [MAX_TEXT, 2_000])
def test_text_is_cut_where_there_is_no_list(html: str, limit: int) -> None:
    found = fitting.html(html, limit)
    assert fits(found, limit)
    assert found[0].rstrip().endswith("(cut here)")


def test_cut_html_keeps_its_tags() -> None:
    body, html = fitting.html(f"<p>{'<b>word</b> ' * 10_000}</p>", MAX_TEXT)
    assert (html or "").startswith("<p><b>word</b> <b>word</b> ")
    assert len(body) > 4_000


@pytest.mark.parametrize("html", ["<b>" * 101 + "x" * 90_000, "<b></i>" * 20_000, "<" * 200_000, "<li " * 90_000 + "x"])
def test_hostile_html_is_cut_in_linear_time(html: str) -> None:
    begun = time.process_time()
    with contextlib.suppress(RefusedError, TooDeepError):  # it holds nothing
        assert fits(fitting.html(html, MAX_TEXT))
    assert time.process_time() - begun < 1  # it is 0.07 at most; the machine may be busy


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "\x01" * 100_000, '"\n' * 50_000, "🔥" * 50_000, "*a* " * 30_000, "- a\n" * 30_000]
)
@pytest.mark.parametrize("limit", [MAX_TEXT, 2_000])
def test_markdown_and_text_are_cut(text: str, limit: int) -> None:
    for found in (fitting.markdown(text, limit), (fitting.text(text, limit), None)):
        assert fits(found, limit)
        assert found[0].endswith("(cut here)")
        assert size_of(found[0]) > limit / 12


def made(body: str, **given: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "source": "alertmanager",
        "headers": {},
        "per": "alerts",
        "template": None,
        "is_text": False,
        "plain": False,
    }
    found: dict[str, Any] = json.loads(webhook(body, whole | given)[0])
    return found


SUMMARY = "{{ payload.alerts[0].annotations.summary }}"


def many(count: int, size: int) -> str:
    each = {"status": "firing", "startsAt": "2026-11-30T00:28:04Z", "annotations": {"summary": "漢" * size}}
    alerts_ = [{**each, "fingerprint": f"f{number}", "labels": {"alertname": f"A{number}"}} for number in range(count)]
    return json.dumps({"status": "firing", "groupKey": "g", "receiver": "r", "version": "4", "alerts": alerts_})


async def test_many_messages_share_what_the_process_may_answer() -> None:
    own = dict.fromkeys(("html", "title", "mentions", "thread", "key"), SUMMARY)
    body = many(MAX_MESSAGES, 9_000)
    found = made(body, template=own)
    assert len(found["messages"]) == MAX_MESSAGES
    for message in found["messages"]:
        assert fits((message["body"], message["html"]), 2_000)
        assert len(message["body"]) > 200
    assert len(json.dumps(found, ensure_ascii=False)) < MAX_HOOK_OUTPUT
    rendering = Rendering()
    try:
        whole: dict[str, Any] = {
            "source": "alertmanager",
            "headers": {},
            "per": "alerts",
            "is_text": False,
            "plain": False,
        }
        assert len((await rendering.webhook(body, whole | {"template": own})).messages) == MAX_MESSAGES
        # Files pass through as they are.
        message = json.dumps({"attachments": [{"data": "QUJD" * 200_000, "filename": "a.txt"}]})
        (said,) = (await rendering.webhook(message, whole | {"source": "generic", "template": None})).messages
        assert len(said.members["attachments"][0]["data"]) == 800_000
    finally:
        await rendering.stop()


def test_messages_beyond_the_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(incoming: Incoming) -> list[Notice]:
        return [Notice(message={"text": str(number)}) for number in range(60)]

    monkeypatch.setitem(BY_NAME, "many", Source("many", "Many", lambda headers, payload: False, read))
    found = made("{}", source="many")
    assert [message["body"] for message in found["messages"]] == [str(number) for number in range(MAX_MESSAGES)]
    assert found["warnings"] == [f"it holds 60 messages: {MAX_MESSAGES} were made"]


@pytest.mark.parametrize("number", [1, 3, 10])
def test_few_messages_have_more_room_each(number: int) -> None:
    found = made(many(number, 40_000), template={"html": SUMMARY})
    sizes = [size_of(message["body"]) + size_of(message["html"] or "") for message in found["messages"]]
    assert len(sizes) == number
    assert min(sizes) > 0.4 * min(MAX_TEXT, 100_000 / number)


def test_keys_and_ids_are_what_a_store_takes() -> None:
    found = made(json.dumps({"text": "x", "key": "a\0\ud800" + "k" * 900}), source="generic")
    (message,) = found["messages"]
    assert len(message["key"]) == 64
    assert "\0" not in json.dumps(message["members"])


def test_what_cannot_be_rendered_is_shown_as_a_text() -> None:
    table = "|a" * 60 + "\n" + "|-" * 60 + "\n" + "|x\n" * 60
    assert fitting.markdown(table, MAX_TEXT) == (table, None)
    assert fitting.html("<b>" * 101 + "deep &amp; <i>down</i>", MAX_TEXT) == ("deep & down", None)
    found = made(json.dumps({"html": "<br>", "a": "b"}), source="generic")
    assert found["warnings"] == [
        "its text cannot be shown, and a summary was sent: holds nothing that a room could show"
    ]
    assert "a: b" in found["messages"][0]["body"]


def test_digest_is_of_all_that_is_shown() -> None:
    def digest(payload: dict[str, Any], **given: Any) -> str:
        return str(made(json.dumps(payload), source="generic", **given)["messages"][0]["digest"])

    first = digest({"text": "x", "key": "k"})
    assert digest({"text": "x", "key": "k", "other": 1}) == first
    assert (
        len({first, digest({"text": "x", "title": "T"}), digest({"text": "x", "title": "U"}), digest({"text": "y"})})
        == 4
    )
    assert digest({"html": '<a href="https://x/">x</a>'}) != digest({"html": '<a href="https://y/">x</a>'})
    # A template shows what the source itself leaves out.
    own = {"template": {"text": "{{ payload.value }}"}}
    assert digest({"text": "x", "value": 1}, **own) != digest({"text": "x", "value": 2}, **own)


def test_fault_in_a_source_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("x")

    broken = Source("broken", "Broken", fail, fail)
    monkeypatch.setitem(BY_NAME, "broken", broken)
    monkeypatch.setattr("flowbridge.sources.SOURCES", (broken, *BY_NAME.values()))
    found = made('{"a": "b"}', source="broken")
    assert (found["messages"][0]["body"], found["warnings"]) == ("- a: b", ["Broken: cannot be read: KeyError"])
    assert made('{"a": "b"}', source="auto")["messages"][0]["body"] == "- a: b"
