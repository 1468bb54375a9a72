"""Where a user id in HTML becomes a link, and where it stays a text."""

import pytest

from flowbridge.rendering.pills import with_pills

AL = '<a href="https://matrix.to/#/@al:hs">@al:hs</a>'


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("hi @al:hs, hi", f"hi {AL}, hi"),
        ("@al:hs", AL),
        ("<b>@al:hs</b>.", f"<b>{AL}</b>."),
        ("(@al:hs) @al:hs", f"({AL}) {AL}"),
        ("@al:hs.", f"{AL}."),
        ("@al:hs: look", f"{AL}: look"),
        ("@al:hs:8448", "@al:hs:8448"),
        ("@al:hs.example", "@al:hs.example"),
        ("@al:hs-2", "@al:hs-2"),
        ("@al:hs2", "@al:hs2"),
        ("x@al:hs", "x@al:hs"),
        ("@bo:hs", "@bo:hs"),
        ('<a href="https://x/">@al:hs</a>', '<a href="https://x/">@al:hs</a>'),
        ("<code>@al:hs</code> @al:hs", f"<code>@al:hs</code> {AL}"),
        ("<pre><code>@al:hs</code></pre>@al:hs", f"<pre><code>@al:hs</code></pre>{AL}"),
        ('<img alt="@al:hs > @al:hs">', '<img alt="@al:hs > @al:hs">'),
        ("</a></a>@al:hs", f"</a></a>{AL}"),
    ],
)
def test_id_in_text_becomes_a_link(html: str, expected: str) -> None:
    assert with_pills(html, ["@al:hs"]) == expected


def test_longest_id_wins() -> None:
    assert with_pills("@al:hs.example", ["@al:hs", "@al:hs.example"]) == (
        '<a href="https://matrix.to/#/@al:hs.example">@al:hs.example</a>'
    )


def test_hostile_id_stays_inside_its_attribute() -> None:
    user = '@"><script>:hs'
    found = with_pills('see @"&gt;&lt;script&gt;:hs', [user])
    assert found == ('see <a href="https://matrix.to/#/@%22%3E%3Cscript%3E:hs">@"&gt;&lt;script&gt;:hs</a>')
