# ruff: noqa: E501 (templates, and what they become, side by side)
"""Templates of hooks: what their authors may use, what is wrong with one, and what a bomb costs."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from minijinja import TemplateError

from flowbridge.errors import BadContent
from flowbridge.rendering import templates
from flowbridge.rendering.processes import Rendering
from flowbridge.rendering.templates import FailedError, compiled, worded
from flowbridge.rendering.webhooks import webhook

T = "2026-11-22T10:00:00Z"


def render(template: str, member: str = "html", **view: Any) -> str:
    return compiled(((member, template),)).render(view).get(member, "")


@pytest.mark.parametrize(
    ("template", "html", "markdown", "text"),
    [
        ("{{ x }}", "a &lt;b&gt; *c*", r"a \<b\> \*c\*", "a <b> *c*"),
        ("{{ x|safe }}", "a <b> *c*", "a <b> *c*", "a <b> *c*"),
        ("{{ x|link('https://x/?a=1&b') }}", '<a href="https://x/?a=1&amp;b">a &lt;b&gt; *c*</a>', r"[a \<b\> \*c\*](<https://x/?a=1&b>)", "a <b> *c* (https://x/?a=1&b)"),
        ("{{ x|link('javascript:alert(1)') }}", "a &lt;b&gt; *c*", r"a \<b\> \*c\*", "a <b> *c*"),
        ("{{ x|link(missing.url) }}", "a &lt;b&gt; *c*", r"a \<b\> \*c\*", "a <b> *c*"),
        ("{{ 'https://x/'|link }}", '<a href="https://x/">https://x/</a>', r"[https://x/](<https://x/>)", "https://x/"),
        ("{{ x|code|link('https://x/') }}", '<a href="https://x/"><code>a &lt;b&gt; *c*</code></a>', "[`a <b> *c*`](<https://x/>)", "a <b> *c* (https://x/)"),
        ("{{ x|markdown }}", "a &lt;b&gt; <em>c</em>", "a <b> *c*", "a <b> *c*"),
        ("{{ x|markdown(blocks=true) }}", "<p>a &lt;b&gt; <em>c</em></p>", "a <b> *c*", "a <b> *c*"),
        ("{{ x|code }}", "<code>a &lt;b&gt; *c*</code>", "`a <b> *c*`", "a <b> *c*"),
        ("{{ 'a`b'|code }}", "<code>a`b</code>", "`` a`b ``", "a`b"),
        ("{{ lines|breaks }}", "a<br>&lt;b&gt;", "a\n\\<b\\>", "a\n<b>"),
        ("{{ long|truncate(10) }}", "aaaa bbbb…", "aaaa bbbb…", "aaaa bbbb…"),
        ("{{ 'aaaaaaaaaaaaaaaa'|truncate(5) }}", "aaaa…", "aaaa…", "aaaa…"),
        ("{{ t|datetime }}", "2026-11-22 10:00 UTC", r"2026\-11\-22 10:00 UTC", "2026-11-22 10:00 UTC"),
        ("{{ 1700000000|datetime }} {{ 'soon'|datetime }} {{ none|datetime }}", "2023-11-14 22:13 UTC soon ", r"2023\-11\-14 22:13 UTC soon ", "2023-11-14 22:13 UTC soon "),
        ("{{ 11100|duration }} {{ t|duration(u) }} {{ 59|duration }} {{ 200000|duration }} {{ 'x'|duration }}", "3 h 5 min 1 d 59 s 2 d 7 h ", "3 h 5 min 1 d 59 s 2 d 7 h ", "3 h 5 min 1 d 59 s 2 d 7 h "),
        ("{{ (j|fromjson).a.b }} {{ 'no'|fromjson }}", "1 no", "1 no", "1 no"),
        ("{{ x|mask }}{{ missing|mask }}", "•••", "•••", "•••"),
        ("{{ d }} {{ none }} {{ missing.a.b }} {{ d.items }} {{ true }} {{ 1.5 }}", "{&quot;a&quot;: [1]}    True 1.5", None, None),
        ("{{ d.values }}", "", "", ""),
        ("{{ v.values }} {{ v.items }}", "1 2", "1 2", "1 2"),
        ("{% for k, v in d|items %}{{ k }}={{ v|join(',') }}{% endfor %}", "a=1", "a=1", "a=1"),
    ],
)  # fmt: skip
def test_filters(template: str, html: str, markdown: str | None, text: str | None) -> None:
    view = {
        "x": "a <b> *c*",
        "lines": "a\r\n<b>",
        "long": "aaaa bbbb cccc dddd",
        "t": T,
        "u": "2026-11-23T10:00:00Z",
        "j": '{"a": {"b": 1}}',
        "d": {"a": [1]},
        "v": {"values": 1, "items": 2},
    }
    for member, expected in (("html", html), ("markdown", markdown), ("text", text)):
        if expected is not None:
            assert render(template, member, **view).replace("&#x2f;", "/").replace("&#x27;", "'") == expected.strip()


WRONG = {
    "a\n{% if x %}": "line 2 of html: unexpected end of input, expected end of block",
    "{{ x|nope }}": "line 1 of html: filter nope is unknown",
    "\n\n{{ 1/0 }}": "line 3 of html: unable to calculate 1 / 0",
    "{{ x.y() }}": "line 1 of html: none has no method named y",
    "{{ x": "line 1 of html: unexpected end of input, expected end of variable block",
    "{% include 'other' %}": "line 1 of html: tried to include non-existing template 'other'",
    "{{ d.pop('nope') }}": "`html`: KeyError: 'nope'",
    "{{ x|truncate('a') }}": "`html`: TypeError: ",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": (
        "line 1 of html: takes too many steps: make its loops shorter"
    ),
}


@pytest.mark.parametrize("template", WRONG)
def test_what_is_wrong_is_said_in_one_line(template: str) -> None:
    with pytest.raises((TemplateError, FailedError)) as found:
        render(template, d={"a": 1}, x="x" * 300 if "truncate" in template else None)
    said = worded(found.value)
    assert said.startswith(WRONG[template])
    assert "\n" not in said
    assert len(said) < 400


def test_template_keeps_nothing() -> None:
    """Neither of one request for the next, nor of one member for the other."""
    template = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% set left = 1 %}{{ payload.left }}"
    both = compiled((("title", template), ("text", template + "{{ left_over }}")))
    for _ in range(3):
        assert both.render({"payload": {}}) == {"title": "1", "text": "1"}


def made(template: dict[str, str], payload: Any = None, **given: Any) -> dict[str, Any]:
    body = json.dumps({"title": "Disk full", "list": [1, 2, 3]} if payload is None else payload)
    whole = {
        "source": "generic",
        "headers": {},
        "per": "notification",
        "template": template,
        "is_text": False,
        "plain": False,
    }
    found: dict[str, Any] = json.loads(webhook(body, whole | given)[0])
    return found


def test_template_makes_the_members_of_a_message() -> None:
    found = made(
        {
            "html": "<b>{{ payload.title }}</b> {{ source }} {{ headers['x-a'] }} {{ event }}{{ key }}{{ state }}",
            "title": "{{ payload.title }}\n second line" + "x" * 600,
            "msgtype": " m.notice ",
            "mentions": '["@a:hs", "@room"]',
            "key": "disk-{{ payload.list[0] }}",
            "thread": "{{ payload.thread }}",
        },
        headers={"x-a": "A"},
    )
    (message,) = found["messages"]
    title = message["members"].pop("title")
    assert title.startswith("Disk full second linexxx")
    assert len(title) == 500
    assert message["members"] == {"msgtype": "m.notice", "mentions": ["@a:hs", "@room"], "key": "disk-1"}
    assert (message["body"], message["html"], message["key"]) == (
        "Disk full generic A",
        "<b>Disk full</b> generic A",
        "disk-1",
    )
    assert made({"text": "x", "mentions": "@a:hs, @b:hs"})["messages"][0]["members"] == {"mentions": "@a:hs, @b:hs"}


def test_body_of_a_markdown_template_has_no_backslashes() -> None:
    (message,) = made({"markdown": "**{{ payload.title }}** {{ payload.a }}"}, {"title": "T", "a": "__init__ 5*3*2"})[
        "messages"
    ]
    assert (message["body"], message["html"]) == ("T __init__ 5*3*2", "<strong>T</strong> __init__ 5*3*2")


@pytest.mark.parametrize(
    "template", [*WRONG, "", "{{ missing }}", "<script>x</script>", "{{ payload.list.append(4) }}{{ 1/0 }}"]
)
def test_what_fails_becomes_a_summary(template: str) -> None:
    found = made({"html": template, "key": "k"})
    (message,) = found["messages"]
    assert message["body"].splitlines()[0] == "Disk full"
    assert [warning.partition(": ")[0] for warning in found["warnings"]] == [
        "the template failed, and a summary was sent"
    ]


BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "markdown in a loop": "{% for i in range(90000) %}{{ ('*a ' ~ i)|markdown }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion over itself": "{% include 'html' %}",
    "recursive loop": "{% for x in [payload] recursive %}{{ loop([x]) }}{% endfor %}",
    "indent": "{{ payload|tojson(indent=2000000000) }}",
    "indent of a text": "{{ 'a\nb'|indent(2000000000) }}",
    "doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubled list of Python": "{% for i in range(60) %}{{ payload.list.extend(payload.list) }}{% endfor %}",
    "doubled text": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "replaced text": "{{ 'a'" + "|replace('a','aaaaaaaaaaaaaaaaaaaa')" * 20 + " }}",
    "joined": "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x|join('x'), ns.x|join('y')] %}{% endfor %}{{ ns.x }}",
    "not": "{{ " + "not " * 4_000 + "x }}",
    "minus": "{{ " + "-" * 16_000 + "x }}",
    "parentheses": "{{ " + "(" * 8_000 + "x" + ")" * 8_000 + " }}",
    "lists": "{{ " + "[" * 8_000 + "]" * 8_000 + " }}",
    "ifs": "{% if x %}" * 1_600,
    "filters": "{{ x" + "|e" * 8_000 + " }}",
    "attributes": "{{ x" + ".a" * 8_000 + " }}",
    "format": "{{ '%2000000000d'|format(1) }}",
    "batch": "{{ [1]|batch(2000000000, 'x')|list }}",
    "power": "{{ 2 ** 4000000000 }} {{ 10 ** 100 }}",
    "repeat": "{{ 'x' * 2000000000 }}",
    "huge output": "{% for i in range(900) %}{{ long }}{% endfor %}",
    "regex of links": "{{ ('http://' ~ long)|link }}",
    "deep JSON": "{{ deep|fromjson }}",
    "deeper JSON": "{{ ('[' * 3000 ~ ']' * 3000)|fromjson|tojson }}",
}  # fmt: skip
HARMLESS = {
    "not",
    "minus",
    "filters",
    "attributes",
    "doubled list of Python",
}  # they come to an end, and to a text or none


@pytest.fixture
async def rendering() -> AsyncIterator[Rendering]:
    found = Rendering()
    yield found
    await found.stop()


@pytest.mark.parametrize("bomb", BOMBS)
async def test_bomb_costs_its_template_not_the_message(rendering: Rendering, bomb: str) -> None:
    """Each ends within the limits of the process, and what was sent is shown all the same."""
    payload = {"title": "Disk full", "list": [1, 2], "long": "x" * 10_000}
    template = {"html": "{% set long = payload.long %}{% set deep = '[' * 900 ~ ']' * 900 %}" + BOMBS[bomb]}
    given = {
        "source": "generic",
        "headers": {},
        "per": "notification",
        "template": template,
        "is_text": False,
        "plain": False,
    }
    began = time.monotonic()
    try:
        found = await rendering.webhook(json.dumps(payload), given)
    except BadContent:  # it was killed
        found = await rendering.webhook(json.dumps(payload), given | {"plain": True})
    assert time.monotonic() - began < 30  # it is 1.2 s at most; the machine may be busy
    (message,) = found.messages
    assert message.rendered.body.startswith("Disk full") or bomb in HARMLESS or len(message.rendered.body) < 24_000
    assert message.rendered.body.strip()
    assert len(message.rendered.body.encode()) + len((message.rendered.html or "").encode()) <= 24_000
    if bomb not in HARMLESS and message.rendered.body.startswith("Disk full"):
        assert found.warnings
    again = await rendering.webhook(json.dumps(payload), given | {"template": {"text": "{{ payload.title }}"}})
    assert again.messages[0].rendered.body == "Disk full"


ODD: list[Any] = [
    *("\ud800", "a\0b", "\x01" * 100, "\u202e", "\u2028", 10**300, -(10**30), 1e308, float("nan"), float("inf")),
    *(json.loads("[" * 60 + "]" * 60), {"": None}, [[], {}], True, None, "{{ 1 }}", "{% x %}"),
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
@pytest.mark.parametrize("member", ["html", "markdown", "text"])
def test_odd_values_are_shown(odd: Any, member: str) -> None:
    filters = "".join(f"{{{{ payload.odd|{name} }}}} " for name in sorted(templates._FILTERS))
    found = made(
        {member: f"T {{{{ payload.odd }}}} {filters}{{{{ payload }}}}", "title": "{{ payload.odd }}"}, {"odd": odd}
    )
    (message,) = found["messages"]
    assert found["warnings"] == []
    assert message["body"].startswith("T")
    for text in (message["body"], message["html"] or "", message["members"].get("title", "")):
        assert "\0" not in text
        text.encode()
