"""HTML, cut down to the tags and attributes that Matrix has (specification, "m.room.message msgtypes")."""

import re
from collections import Counter
from html import escape, unescape

import nh3

from flowbridge.rendering.pills import TAG

MAX_OPEN = 100  # tags at a time, as the specification says; nh3 takes quadratic time: 32 kB of open tags took it 13 s

_TAGS = (
    "del h1 h2 h3 h4 h5 h6 blockquote p a ul ol sup sub li b i u strong em s code hr br div table thead tbody tr th td "
    "caption pre span img details summary"
)
TAGS = frozenset(_TAGS.split())
ATTRIBUTES: dict[str, set[str]] = {
    "*": set(),  # nh3 itself would keep some
    "span": {"data-mx-bg-color", "data-mx-color", "data-mx-spoiler", "data-mx-maths"},
    "div": {"data-mx-maths"},
    "a": {"href"},
    "img": {"width", "height", "alt", "title", "src"},
    "ol": {"start"},
    "code": {"class"},
}
SCHEMES = frozenset({"https", "http", "ftp", "mailto", "magnet", "mxc"})
# What these hold is no text that people wrote.
_UNREAD = (
    "script style title textarea noscript iframe template svg math mx-reply xmp noembed noframes plaintext select "
    "object audio video canvas"
)

_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
# These close by themselves, or hold nothing.
_UNCOUNTED = frozenset("p li td th tr dt dd br hr img input wbr meta link area col source".split())  # noqa: SIM905
_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_NUMBER = re.compile(r"[0-9]{1,5}")
_LANGUAGE = re.compile(r"language-[A-Za-z0-9_+#.-]{1,50}")
_ALT = re.compile(r' alt="([^"]*)"')
_FORMATS = {
    "data-mx-bg-color": _COLOR,
    "data-mx-color": _COLOR,
    "width": _NUMBER,
    "height": _NUMBER,
    "start": _NUMBER,
}


_INLINE = frozenset(("a", "code", "del", "em", "strong"))
_HEADS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = frozenset(("blockquote", "p", "ol", "ul", *_HEADS))
_HOLDS = {
    "": _BLOCKS | _INLINE,
    "blockquote": _BLOCKS,
    **dict.fromkeys(("ol", "ul"), frozenset(("li",))),
    "li": frozenset(("p", "ol", "ul", *_INLINE)),
    **dict.fromkeys(("p", *_HEADS, *_INLINE), _INLINE),
}
MAX_INSIDE = 10
# No character that a parser replaces, or writes in another way.
_OCTET = r"(?:1[0-9][0-9]|2[0-4][0-9]|[1-9]?[0-9])"
_HOST = rf"(?:(?:[a-z0-9][a-z0-9-]{{0,62}}\.){{0,9}}[a-z][a-z0-9]{{0,62}}|(?:{_OCTET}\.){{3}}{_OCTET})"
_REST = r"(?:[/?#](?:[!#-%'-;=?-~]|&amp;)*+)?"  # ASCII, without what may not be in an attribute
_CLEAN = re.compile(
    rf"""(?:[^<>&\0\r\xa0\ufeff]++|&(?:amp|lt|gt);|</?(?:p|[uo]l|li|code|del|em|strong|blockquote|h[1-6])>|<br>|</a>|"""
    rf"""<a href="https?://(?!xn--|[^/"]*\.xn--){_HOST}(?::[0-9]{{1,4}})?{_REST}">)*+"""
)
_NAMES = re.compile(r"<(/?)([a-z1-6]+)")


class TooDeepError(ValueError):
    """Tags are nested too deeply, or never closed."""


def clean(html: str) -> str:
    """The HTML without anything that rooms do not show. Raises TooDeepError."""
    if is_clean(html):
        return html
    check_depth(html)
    found = _CLEANER.clean(html)
    return _without_foreign_images(found) if "<img" in found else found


def is_clean(html: str) -> bool:
    """Whether nothing of it would be changed: that takes a third of the time, and holds for most of what we write.

    A few tags as they are written canonically, nested as a parser would have them; URLs whose host is beyond doubt.
    """
    if not _CLEAN.fullmatch(html):
        return False
    inside = [""]
    for closes, name in _NAMES.findall(html):
        if closes:
            if inside.pop() != name:
                return False
        elif name != "br":
            if name not in _HOLDS[inside[-1]] or (name in _INLINE and name in inside) or len(inside) > MAX_INSIDE:
                return False
            inside.append(name)
    return len(inside) == 1


def check_depth(html: str) -> None:
    """Raises TooDeepError; in linear time. An end tag that closes nothing does not count."""
    if html.count("<") <= MAX_OPEN:
        return
    open_tags: Counter[str] = Counter()
    depth = 0
    for closes, tag in _TAG.findall(html):
        name = tag.lower()
        if name in _UNCOUNTED:
            continue
        if not closes:
            open_tags[name] += 1
            depth += 1
            if depth > MAX_OPEN:
                raise TooDeepError(f"has more than {MAX_OPEN} tags open at a time")
        elif open_tags[name]:
            open_tags[name] -= 1
            depth -= 1


def _attribute(tag: str, name: str, value: str) -> str | None:
    if name == "class":
        classes = [each for each in value.split() if _LANGUAGE.fullmatch(each)]
        return " ".join(classes) or None
    if (form := _FORMATS.get(name)) is not None and not form.fullmatch(value):
        return None
    is_mxc = value.lower().startswith("mxc:")
    if name in ("href", "src") and is_mxc != (tag == "img"):  # pictures are on homeservers, pages are not
        return None
    return value


_CLEANER = nh3.Cleaner(
    tags=set(TAGS),
    attributes=ATTRIBUTES,
    attribute_filter=_attribute,
    clean_content_tags=set(_UNREAD.split()),
    url_schemes=set(SCHEMES),
    url_relative="deny",
    link_rel=None,
)


def _without_foreign_images(html: str) -> str:
    """Clients show no picture from elsewhere: its text stands for it."""

    def shown(found: re.Match[str]) -> str:
        tag = found[0]
        if not tag.startswith("<img") or ' src="mxc://' in tag:
            return tag
        alt = _ALT.search(tag)
        return escape(unescape(alt[1]), quote=False) if alt else ""

    return TAG.sub(shown, html)
