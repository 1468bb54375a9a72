# ruff: noqa: E501 (bodies, and what is shown of them, side by side)
"""Slack's text as HTML."""

import time

import pytest

from flowbridge.sources.emoji import emoji, with_emoji
from flowbridge.sources.mrkdwn import MAX_CHARACTERS, Mrkdwn


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", "plain"),
        ("*bold* _italic_ ~strike~ `code`", "<strong>bold</strong> <em>italic</em> <del>strike</del> <code>code</code>"),
        ("*_both_*", "<strong><em>both</em></strong>"),
        ("*a _b* c_", "<strong>a _b</strong> c_"),
        ("(*a*), *b*. *c*", "(<strong>a</strong>), <strong>b</strong>. <strong>c</strong>"),
        ("5*3*2 and __init__ and snake_case_name", "5*3*2 and __init__ and snake_case_name"),
        ("a * not bold*, *nor this *", "a * not bold*, *nor this *"),
        ("*open\nclosed*", "*open<br>closed*"),
        ("** ~~ __ * _", "** ~~ __ * _"),
        ("**Markdown** ~~too~~", "<strong>Markdown</strong> <del>too</del>"),
        ("`*not bold*` &lt;b&gt;", "<code>*not bold*</code> &lt;b&gt;"),
        ("&amp;lt; is un-escaped once", "&amp;lt; is un-escaped once"),
        ("R&D <3 a<b", "R&amp;D &lt;3 a&lt;b"),
        ("a\nb\n\nc", "<p>a<br>b</p>\n<p>c</p>"),
        ("a\r\nb", "a<br>b"),
        ("&gt; quoted\n&gt; more\nnot", "<blockquote>quoted<br>more</blockquote>\n<p>not</p>"),
        ("> quoted", "<blockquote>quoted</blockquote>"),
        ("see:\n• a\n- *b*\n* c\nend", "<p>see:</p>\n<ul><li>a</li><li><strong>b</strong></li><li>c</li></ul>\n<p>end</p>"),
        ("1. a\n2. b", "1. a<br>2. b"),
        ("## Head\ntext", "<p><strong>Head</strong></p>\n<p>text</p>"),
        ("#1234 is no head", "#1234 is no head"),
        ("a ```x &lt; *y*\nz``` b", "<p>a</p>\n<pre><code>x &lt; *y*\nz</code></pre>\n<p>b</p>"),
        ("never ```closed", "never ```closed"),
        ("```<https://x/|x> <https://y/>```", "<pre><code>x https://y/</code></pre>"),
        ("<https://x/?a=1&amp;b=2|a *b*>", '<a href="https://x/?a=1&amp;b=2">a *b*</a>'),
        ("<https://x/>", '<a href="https://x/">https://x/</a>'),
        ("<https://x/|>", '<a href="https://x/">https://x/</a>'),
        ('<https://x/"onclick="alert(1)|x>', '<a href="https://x/&quot;onclick=&quot;alert(1)">x</a>'),
        ("<mailto:a@b.example|A>", '<a href="mailto:a@b.example">A</a>'),
        ("<mailto:a@b.example>", '<a href="mailto:a@b.example">a@b.example</a>'),
        ("<javascript:alert(1)|click>", "click"),
        ("<javascript:alert(1)>", "&lt;javascript:alert(1)&gt;"),
        ("<tel:+123|call>", "call"),
        ("[text](https://x/)", '<a href="https://x/">text</a>'),
        ("[x] (https://x/a_b_c).", '[x] (<a href="https://x/a_b_c">https://x/a_b_c</a>).'),
        ("https://x/*a* b", '<a href="https://x/*a">https://x/*a</a>* b'),
        ("*https://y/*, b.", '<strong><a href="https://y/">https://y/</a></strong>, b.'),
        ("<@U024BE7LH> <@U02|al> <#C02> <#C02|general>", "@U024BE7LH @al #C02 #general"),
        ("<!subteam^S1|@team> <!subteam^S1> <!nope>", "@team @subteam @nope"),
        ("<!date^1392734382^{date}|Feb 18>", "Feb 18"),
        ("<!date^1392734382^{date}^https://x/|Feb 18>", '<a href="https://x/">Feb 18</a>'),
        ("<!date^1392734382^{date}>", "2014-02-18 14:39 UTC"),
        ("<!date^99999999999999^{date}> <!date^x^y>", "99999999999999 x"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        (":fire::warning: :nope: 10:30:45 `:fire:`", "🔥⚠️ :nope: 10:30:45 <code>:fire:</code>"),
        ("", ""),
        ("   \n ", ""),
    ],
)  # fmt: skip
def test_text_is_shown_as_slack_shows_it(text: str, html: str) -> None:
    assert Mrkdwn().html(text) == html


def test_title_is_one_line() -> None:
    assert Mrkdwn().line("a *b*\n c") == "a <strong>b</strong> c"


def test_text_is_bounded() -> None:
    mrkdwn = Mrkdwn()
    assert len(mrkdwn.html("x" * 1_000_000)) == MAX_CHARACTERS + 1
    assert mrkdwn.html("more") == "…"


def test_emoji_have_slacks_and_githubs_names() -> None:
    assert [emoji(name) for name in ("warning", "white_check_mark", "+1", "rotating_light", "cd")] == [
        "⚠️",
        "✅",
        "👍",
        "🚨",
        "💿",
    ]
    assert [emoji(name) for name in ("", "nope", "<b>", "a" * 50, "**", "_x_")] == [""] * 6
    assert with_emoji("12:fire:3 a:fire: ::fire:: std::vector::x") == "12:fire:3 a:fire: :🔥: std::vector::x"


UNITS = ["*a ", "_a_*", "`a ", "<a", "<http://", "[a](http://", "```", "> ", "- ", ":a:", " :fire:", "*_~a~_* ", "* \n", "&", "<!date^1^", "**", "[", "<|"]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit: str) -> None:
    text = (unit * MAX_CHARACTERS)[:MAX_CHARACTERS]
    begun = time.process_time()
    Mrkdwn().html(text)
    assert time.process_time() - begun < 1  # it is 0.05 at most; the machine may be busy
