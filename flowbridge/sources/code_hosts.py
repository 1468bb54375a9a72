"""What all code hosts report, in one shape: who did what where, in one line, and what belongs to it. Pure.

Titles, branches and commit messages are plain text (`__init__`, `5*3*2`); what people write at length is Markdown.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from flowbridge.sources import markup
from flowbridge.sources.markup import shown
from flowbridge.sources.reading import at, text
from flowbridge.sources.source import Json, Markdown, Notice, State

MAX_COMMITS = 5  # shown; GitHub sends up to 2,048
MAX_NAMES = 10  # of labels, jobs, people
MAX_LINE = 250  # characters of a title: GitHub has 256
MAX_NAME = 120
MAX_QUOTE = 700  # characters of a comment or description
MAX_NOTES = 1_500  # of a release
_READ = 20_000  # characters of a text that are looked at

_NO_COMMIT = re.compile(r"0{7,64}")
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_PICTURE = re.compile(r"<img\b[^<>]{0,2000}>", re.IGNORECASE)
_SOURCE = re.compile(r"""\ssrc=["'](https?://[^\s"'<>]{1,1000})["']""", re.IGNORECASE)
_BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)
_CLINGS = frozenset((",", ":", ")"))  # to what is before them


class Part(TypedDict):
    """A piece of a line: text, code, or the text of a link."""

    text: str
    url: NotRequired[str]
    code: NotRequired[bool]


class Item(TypedDict):
    """A line of a list, mostly a commit: its hash, its message as a link, its author."""

    mark: str
    text: str
    url: str
    by: str


Line = list[Part]
Piece = str | Part | Line | int | None  # numbers and None: nothing, as `count and …` has it
Fields = Mapping[str, Any]


@dataclass(slots=True)
class Report:
    """One message. `headline`: who did what. `facts`: short lines below it. `items` and how many more there are.

    `quote`: text in Markdown. `outcome`: how it ended, for `ignore`. For the others see `source.Notice`.
    """

    headline: Line
    icon: str = ""
    facts: list[Line] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    left: int = 0
    left_url: str = ""
    quote: str = ""
    outcome: str = ""
    is_quiet: bool = False
    key: str = ""
    state: State = ""
    firing: tuple[str, ...] = ()
    time: int | None = None

    def notice(self, event: str, where: str, who: str) -> Notice:
        view: Json = {
            "repository": where,
            "who": who,
            "icon": self.icon,
            "title": "".join(part["text"] for part in self.headline),
            "url": next((part["url"] for part in self.headline if part.get("url")), ""),
            "headline": self.headline,
            "facts": self.facts,
            "items": self.items,
            "left": self.left,
            "left_url": self.left_url,
            "quote": self.quote,
            "outcome": self.outcome,
        }
        return Notice(
            event,
            view,
            key=self.key,
            state=self.state,
            firing=self.firing or (("",) if self.state == "firing" else ()),
            time=self.time,
            outcome=self.outcome,
            is_quiet=self.is_quiet,
        )


def link(label: str, url: str) -> Part:
    """A link, if it is one: text else."""
    return {"text": label, "url": url} if _URL.fullmatch(url) else {"text": label}


def code(label: str) -> Part | None:
    return {"text": label, "code": True} if label else None


def sentence(*pieces: Piece) -> Line:
    """Pieces with spaces between them, without those that are empty."""
    found: Line = []
    for piece in pieces:
        if not (parts := [part for part in _parts(piece) if part["text"]]):
            continue
        if found and parts[0]["text"] not in _CLINGS and not found[-1]["text"].endswith((" ", "(")):
            found.append({"text": " "})
        found += parts
    return found


def _parts(piece: Piece) -> Line:
    if piece is None or isinstance(piece, int):
        return []
    if isinstance(piece, str):
        return [{"text": piece}]
    return piece if isinstance(piece, list) else [piece]


def fact(name: str, *pieces: Piece) -> Line:
    """`name: …`; nothing where there is nothing to say."""
    said = sentence(*pieces)
    return [{"text": f"{name}: "}, *said] if said else []


def facts(*lines: Line) -> list[Line]:
    return [line for line in lines if line]


def joined(*lines: Line) -> Line:
    """Short lines in one."""
    found: Line = []
    for each in facts(*lines):
        found += [*([Part(text=" · ")] if found else []), *each]
    return found


def listed(names: Sequence[str]) -> Line:
    """`a`, `b`, and 3 more."""
    found: Line = []
    for name in [name for name in names[:MAX_NAMES] if name]:
        if found:
            found.append({"text": ", "})
        found.append({"text": name, "code": True})
    more = len(names) - MAX_NAMES
    return [*found, {"text": f" and {more} more"}] if more > 0 and found else found


def line(value: Any, *path: str, limit: int = MAX_LINE) -> str:
    """The text at a path, in one line and within bounds."""
    found = " ".join(text(value, *path)[: 4 * limit].split())
    return found if len(found) <= limit else f"{found[: limit - 1].rstrip()}…"


def name(value: Any, *path: str) -> str:
    return line(value, *path, limit=MAX_NAME)


def first_line(value: Any, *path: str) -> str:
    """Of a commit's message."""
    found = text(value, *path)[: 4 * MAX_LINE].strip()
    return line(found.split("\n", 1)[0])


def first(*found: str) -> str:
    return next((each for each in found if each), "")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def number(value: Any, *path: str) -> int:
    """The whole number at a path that counts something; 0 for anything else."""
    found = at(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 10**12 else 0


def spoken(word: str) -> str:
    """`checks_requested`, as people say it."""
    return word.replace("_", " ").replace("-", " ").strip() or word


def commit(sha: str, message: Piece, person: str) -> Line:
    """`abc1234 Its message — its author`."""
    found = sentence(code(sha), message)
    return sentence(found, f"— {person}" if person else "") if found else []


def short(sha: Any) -> str:
    found = sha if isinstance(sha, str) else ""
    return "" if not found or _NO_COMMIT.fullmatch(found) else found[:7]


def is_none(sha: Any) -> bool:
    """Whether this is the commit of 40 zeros: the branch was created, or deleted."""
    return isinstance(sha, str) and bool(_NO_COMMIT.fullmatch(sha))


def branch(ref: Any, limit: int = MAX_NAME) -> tuple[str, str]:
    """`branch` or `tag`, and its name."""
    found = ref if isinstance(ref, str) else ""
    kind = "tag" if found.startswith("refs/tags/") else "branch"
    return kind, line(found.removeprefix("refs/tags/").removeprefix("refs/heads/"), limit=limit)


def quote(value: Any, *path: str, limit: int = MAX_QUOTE) -> str:
    """The beginning of a text in Markdown, without what code hosts have in it and no room shows.

    Templates of issues leave comments behind, Dependabot's begin a `<details>` after the first sentence, and pictures
    that were dropped into the editor are HTML.
    """
    found = text(value, *path)[:_READ].replace("\r\n", "\n").replace("\r", "\n")
    found = _without_comments(found)
    before, details, _ = found.partition("<details")
    if details and before.strip():
        found = f"{before.rstrip()} …"
    found = _BREAK.sub("\n", _PICTURE.sub(_picture, found)).strip()
    if len(found) <= limit:
        return found
    start = found[: limit - 1]
    return f"{start.rsplit(None, 1)[0] if any(map(str.isspace, start[limit // 2 :])) else start}…"


def _without_comments(found: str) -> str:
    kept, begin = [], 0
    while (start := found.find("<!--", begin)) >= 0:
        kept.append(found[begin:start])
        end = found.find("-->", start)
        if end < 0:
            return "".join(kept)
        begin = end + 3
    return "".join([*kept, found[begin:]])


def _picture(found: re.Match[str]) -> str:
    source = _SOURCE.search(found[0])
    return f"[picture]({source[1]})" if source else ""


def key(*parts: str) -> str:
    """Of a story; empty where a part is missing."""
    return "/".join(parts) if all(parts) else ""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run, a job, a check or a deployment goes. Green ones only tell; red ones are news each time."""

    icon: str
    verb: str
    state: State
    is_quiet: bool = False


_BEFORE = (
    *("queued", "waiting", "pending", "preparing", "scheduled", "waiting_for_resource", "waiting_for_callback"),
    *("canceling", "inactive"),  # GitHub says the latter of each deployment that another one replaces
)
_ASKED = ("created", "requested", "rerequested", "requested_action")
_ENDINGS = {  # GitHub's conclusions, GitLab's statuses, and Gitea's
    "success": Ending("✅", "passed", "resolved"),
    **dict.fromkeys(("failure", "failed", "error"), Ending("❌", "failed", "firing")),
    "timed_out": Ending("❌", "timed out", "firing"),
    "startup_failure": Ending("❌", "could not start", "firing"),
    "action_required": Ending("✋", "waits for approval", "firing"),
    **dict.fromkeys(("cancelled", "canceled"), Ending("⏹️", "was cancelled", "resolved")),
    "skipped": Ending("⏭️", "was skipped", "resolved", is_quiet=True),
    "neutral": Ending("◽", "ended without a verdict", "resolved", is_quiet=True),
    "stale": Ending("◽", "was given up", "resolved", is_quiet=True),
    **dict.fromkeys(("in_progress", "running"), Ending("▶️", "started", "resolved")),
    **{name: Ending("", f"is {spoken(name)}", "resolved", is_quiet=True) for name in _BEFORE},
    **{name: Ending("", f"was {spoken(name)}", "resolved", is_quiet=True) for name in _ASKED},
    "manual": Ending("✋", "waits for somebody to start it", "resolved", is_quiet=True),
}


def ending(outcome: str) -> Ending:
    """One that is unknown is told, but it does not fire."""
    return _ENDINGS.get(outcome) or Ending("", f"ended: {spoken(outcome)[:MAX_NAME] or 'unknown'}", "resolved")


def checked(what: Line, ref: str, lasting: str, more: Part, outcome: str) -> Report:
    """`CI failed on main after 3 min: run #42`"""
    end = ending(outcome)
    has_more = bool(more.get("url")) or more["text"] != "details"
    return Report(
        sentence(what, end.verb, ref and "on", code(ref), lasting, has_more and ":", more if has_more else None),
        end.icon,
        outcome=outcome,
        is_quiet=end.is_quiet,
        state=end.state,
    )


def deployed(what: Part | None, state: str, environment: str, person: str, more: Part) -> Line:
    """`main was deployed to production by octocat: details`"""
    verb = {
        "in_progress": "is being deployed",
        "running": "is being deployed",
        "success": "was deployed",
        "canceled": "was not deployed",
    }.get(state, f"is {spoken(state)[:40] or 'waiting'} for deployment")
    verb = "could not be deployed" if ending(state).state == "firing" else verb
    has_more = bool(more.get("url"))
    return sentence(
        what or "A commit",
        verb,
        environment and f"to {environment}",
        person and f"by {person}",
        has_more and ":",
        more if has_more else None,
    )


def in_order(time: int | None, is_over: bool) -> int | None:
    """Senders count in seconds: in the same one, the end comes after the beginning."""
    return time + is_over if time is not None else None


def lasted(start: int | None, end: int | None) -> str:
    """`after 3 min`, of moments in milliseconds."""
    seconds = (end - start) // 1000 if start is not None and end is not None else 0
    if not 0 < seconds < 30 * 86_400:
        return ""
    if seconds < 60:
        return f"after {seconds} s"
    if seconds < 3_600:
        return f"after {seconds // 60} min"
    return f"after {seconds // 3_600} h {seconds % 3_600 // 60} min"


# The link ends the headline: where a client shows no HTML, its address comes behind it.
def words(view: Json, markdown: Markdown) -> str:
    """A notice as HTML."""
    icon, where, items, left = view["icon"], view["repository"], view["items"], view["left"]
    found = [f"<p>{shown(icon)} " if icon else "<p>", f"<strong>{shown(where)}</strong>: " if where else ""]
    found.append("<br>".join([_shown(each) for each in (view["headline"], *view["facts"])]))
    found.append("</p>\n")
    if items:
        found.append(f"<ul>{''.join(map(_item, items))}")
        found.append(f"<li>{markup.link(f'… and {left} more', view['left_url'])}</li></ul>\n" if left else "</ul>\n")
    if view["quote"]:
        found.append(f"<blockquote>{markdown(view['quote'])}</blockquote>")
    return "".join(found)


def _shown(parts: Line) -> str:
    found = []
    for part in parts:
        if url := part.get("url"):
            found.append(markup.link(part["text"], url))
        else:
            found.append(markup.code(part["text"]) if part.get("code") else shown(part["text"]))
    return "".join(found)


def _item(item: Item) -> str:
    mark, by = item.get("mark"), item.get("by")
    said = markup.link(item["text"], item.get("url"))
    return f"<li>{f'{markup.code(mark)} ' if mark else ''}{said}{f' — {shown(by)}' if by else ''}</li>"
