"""What is clean already is told from what the library has to clean."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbridge.rendering import cleaning
from flowbridge.rendering.cleaning import clean, is_clean

HOSTS = [
    "example.org",
    "localhost",
    "a-b.c-d.example",
    "a-.-b.example",
    "1.2.3.4",
    "255.1.1.1",
    "256.1.1.1",
    "09.09.08.01",
    "0x.1.2.3",
    "a.1b",
    "a.b0x1",
    "1.2.a",
    "1.2.3",
    "xn--a.org",
    "a.xn--b",
    "ab--cd.xy",
    "EXAMPLE.org",
    "[::1]",
    "user@a.org",
    "a..b",
    "a.",
    "-a.b",
    "ä.org",
]
RESTS = [
    "",
    "/",
    "/a?b=1&amp;c=%zz#%",
    ":9090/[x]|{}^`\\",
    ":99999",
    ":0",
    "?x",
    "#",
    "/;javascript:",
    "/\t",
    "/\xa0",
    '/"',
    "/&",
]
LINKS = [f'<a href="{scheme}://{host}{rest}">' for scheme in ("http", "https") for host in HOSTS for rest in RESTS]
NAMES = ("p", "ul", "ol", "li", "code", "em", "strong", "del", "blockquote", "h1", "h3")
TAGS = [f"<{end}{name}>" for name in NAMES for end in ("", "/")]
OTHERS = [
    "</a>",
    "<br>",
    "<br/>",
    "<P>",
    "<pre>",
    "<img>",
    "<script>",
    '<p\tid="x">',
    "<a>",
    "<a",
    'href="javascript:x">',
    "<!--",
    "<!",
]
TEXTS = [
    "x",
    " ",
    "\n",
    "é🔥",
    "&amp;",
    "&lt;",
    "&gt;",
    "&quot;",
    "&#39;",
    "&nbsp;",
    "&",
    '"',
    "'",
    "/",
    "=",
    "]]>",
    "--",
]
ODD = ["\0", "\r", "\t", "\x0b", "\x7f", "\x85", "\xa0", "\xad", "\u2028", "\ufeff"]

pieces = st.lists(
    st.sampled_from([*TAGS * 4, *TEXTS * 2, *OTHERS, *ODD]) | st.sampled_from(LINKS) | st.text(max_size=3)
)


@st.composite
def nested(draw: st.DrawFn) -> str:
    """Tags that are closed in their order, mostly as they may be nested."""
    name = draw(st.sampled_from([*NAMES, *LINKS]))
    inside = draw(st.lists(nested() | st.sampled_from([*TEXTS, *ODD, "<br>"]), max_size=3))
    begin, end = (name, "</a>") if name.startswith("<a") else (f"<{name}>", f"</{name}>")
    return f"{begin}{''.join(inside)}{end}"


@settings(max_examples=300)
@given(pieces.map("".join) | st.lists(nested(), max_size=3).map("".join))
def test_what_is_clean_would_not_be_changed(html: str) -> None:
    if is_clean(html):
        assert cleaning._CLEANER.clean(html) == html


def test_no_link_is_clean_that_would_be_changed() -> None:
    for link in LINKS:
        html = f"<p>{link}x</a></p>"
        if is_clean(html):
            assert cleaning._CLEANER.clean(html) == html


@pytest.mark.parametrize(
    "html",
    [
        "",
        "text &amp; 'text'",
        (
            "<p>🔥 <strong>HighLatency</strong>: firing</p>\n<p>one<br>two</p><p>job: a/b</p>\n<p>"
            '<a href="http://prometheus.example.org:9090/graph?g0.expr=a&amp;b#c">Source</a> · x</p>'
        ),
        '<ul>\n<li><code>6113728</code> <a href="https://10.0.0.1/">x</a><ul><li>y</li></ul></li>\n</ul>',
        "<h1>x</h1>\n<ol>\n<li>\n<p>a <del>b</del></p>\n<ul>\n<li>c</li>\n</ul>\n</li>\n</ol>",
        "<blockquote>\n<p>x</p>\n<blockquote>\n<ul>\n<li>y</li>\n</ul>\n</blockquote>\n</blockquote>",
    ],
)
def test_what_sources_and_markdown_become_is_clean(html: str) -> None:
    assert is_clean(html)
    assert clean(html) is html


@pytest.mark.parametrize(
    "html",
    [
        *(
            "<p>",
            "</p>",
            "<p><p>x</p></p>",
            "<p><ul></ul></p>",
            "<li>x</li>",
            "<ul><p>x</p></ul>",
            "<strong><p>x</p></strong>",
        ),
        *(
            '<a href="https://a.b"><a href="https://a.b"></a></a>',
            "<em><strong>x</em></strong>",
            "<p>x</P>",
            "<p >x</p>",
        ),
        *(
            "a&b",
            "&nbsp;",
            "<script>x</script>",
            '<a href="javascript:x">y</a>',
            '<a href="https://a.b" onclick="x">y</a>',
        ),
        *("<em>" * 3 + "</em>" * 3, "<ul><li>" * 9 + "</li></ul>" * 9),
    ],
)
def test_what_a_parser_might_see_otherwise_is_cleaned(html: str) -> None:
    assert not is_clean(html)


def test_it_takes_linear_time() -> None:
    for bomb in (
        "<p>x" * 50_000,
        '<a href="https://' + "a." * 50_000,
        "<p>" + "&amp;" * 50_000 + "&",
        "x" * 1_000_000 + "<",
    ):
        assert not is_clean(bomb)
