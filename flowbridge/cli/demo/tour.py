"""The tour of `flowbridge demo`: send every event of the seed documents to the bridge, and find it in the room."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowbridge.cli.demo.examples import LEGACY, Example
from flowbridge.cli.demo.synapse import Account, LocalSynapse

Shape = Literal["whole event", "content", "flow message", "plain text"]

# Longer than the bridge itself waits for the homeserver, so that the bridge's answer is what a row shows.
ANSWER_SECONDS = 30
WIDE = 120  # columns of a terminal that whole event ids fit into
# What a homeserver adds to a membership, from the user's profile.
PROFILE_KEYS = frozenset({"displayname", "avatar_url"})


@dataclass(frozen=True)
class Row:
    """One line of the table; `seen` is what is wrong with the event in the room, None when it is as it was sent."""

    label: str
    posted: str
    answer: str
    seen: str | None
    note: str = ""


@dataclass(frozen=True)
class _Tour:
    room_id: str
    editor: httpx.Client
    bot: httpx.Client
    friend: httpx.Client


def run(
    bridge_url: str,
    homeserver: LocalSynapse,
    api_key: str,
    bot: Account,
    friend: Account,
    examples: Sequence[Example],
    console: Console,
    *,
    hints: bool = True,
) -> bool:
    """Send each example through the bridge, read it back, and print the table; True when every row is right.

    `hints`: print at the end how to go on by hand, for as long as the bridge keeps running.
    Raises httpx.HTTPError when the homeserver refuses the room itself: no row could be right then.
    """
    with ExitStack() as stack:
        editor = stack.enter_context(_client(bridge_url, {"X-API-Key": api_key}))
        as_bot = stack.enter_context(_client(homeserver.url, _bearer(bot)))
        as_friend = stack.enter_context(_client(homeserver.url, _bearer(friend)))
        tour = _Tour(_create_room(as_bot), editor, as_bot, as_friend)
        steps = [*examples, *LEGACY]
        rows = _show_progress(_rows(tour, steps, bot, friend), 1 + len(steps), console)
    console.print(_table(rows, console))
    failed = sum(row.seen is not None for row in rows)
    summary = f"{len(rows) - failed} of {len(rows)} events are in the room {tour.room_id}"
    console.print(Text(summary), soft_wrap=True)
    if hints:
        target = f"{bridge_url}{_path('rooms', tour.room_id, 'send', 'm.room.message')}"
        _print_hints(console, target, api_key, homeserver.url, friend)
    return not failed


def _rows(tour: _Tour, examples: Sequence[Example], bot: Account, friend: Account) -> Iterator[Row]:
    """Each row as soon as it is known, in an order in which a homeserver accepts the events.

    The bot's own joins first, then the friend's invitation, which the friend accepts; the power levels of
    2014 last, since they name no user and take the sender's power away before room version 12.
    """
    yield _created(tour, bot)
    memberships = [one for one in examples if one.type == "m.room.member"]
    levels = [one for one in examples if one.type == "m.room.power_levels"]
    others = [one for one in examples if one not in memberships and one not in levels]
    for example in sorted(memberships, key=lambda one: one.content["membership"] == "invite"):
        yield _send_and_find(tour, example, "whole event", tour.bot)
    _join(tour, friend)
    messages = 0
    for example in [*others, *levels]:
        yield _send_and_find(tour, example, _shape(example, messages), tour.friend)
        messages += example.state_key is None


def _shape(example: Example, messages_before: int) -> Shape:
    """State is sent as whole events, plain text as text; other messages alternate between the shapes."""
    if example.state_key is not None:
        return "whole event"
    if example.content.keys() == {"msgtype", "body"} and example.content["msgtype"] == "m.text":
        return "plain text"
    shapes: tuple[Shape, ...] = ("whole event", "flow message", "whole event", "content")
    return shapes[messages_before % len(shapes)]


def _created(tour: _Tour, bot: Account) -> Row:
    """The homeserver creates m.room.create; its `creator` of 2014 is the sender since room version 11."""
    path = _path("rooms", tour.room_id, "state", "m.room.create") + "?format=event"
    try:
        event = _json(tour.bot.get(f"/_matrix/client/v3{path}"))
        seen = None if event.get("sender") == bot.user_id else _why(event)
    except httpx.HTTPError as error:
        event, seen = {}, _describe(error)
    return Row("m.room.create", "by createRoom", str(event.get("event_id", "")), seen)


def _send_and_find(tour: _Tour, example: Example, shape: Shape, reader: httpx.Client) -> Row:
    method, path = _address(tour.room_id, example)
    try:
        response = tour.editor.request(method, path, **_payload(example, shape))
        answer = _json(response)
        event_id = answer.get("event_id")
        if response.status_code == httpx.codes.OK and isinstance(event_id, str):
            seen, note = _find(reader, tour.room_id, example, event_id)
            return Row(example.label, f"{method} {shape}", f"200 {event_id}", seen, note)
        return Row(example.label, f"{method} {shape}", str(response.status_code), _why(answer))
    except httpx.HTTPError as error:
        return Row(example.label, f"{method} {shape}", "none", _describe(error))


def _address(room_id: str, example: Example) -> tuple[str, str]:
    if example in LEGACY:
        return "PUT", _path("rooms", room_id, "state", example.type)
    return "POST", _path("rooms", room_id, "send", example.type)


def _payload(example: Example, shape: Shape) -> dict[str, Any]:
    """httpx's arguments for one of the four shapes of a body."""
    match shape:
        case "whole event":
            return {"json": example.body}
        case "content":
            return {"json": example.content}
        case "flow message":
            return {"json": {"_msgid": secrets.token_hex(8), "payload": example.content, "topic": ""}}
        case "plain text":
            return {"content": example.content["body"], "headers": {"Content-Type": "text/plain"}}


def _find(reader: httpx.Client, room_id: str, example: Example, event_id: str) -> tuple[str | None, str]:
    """What is wrong with the event in the room, or None; and what the homeserver added to it."""
    base = f"/_matrix/client/v3{_path('rooms', room_id)}"
    event = _json(reader.get(f"{base}/event/{quote(event_id, safe='')}"))
    found = [event.get("content")]
    if event.get("type") != example.type or event.get("state_key") != example.state_key:
        return f"found instead: {_why(event)}", ""
    if example.state_key is not None:
        found.append(_json(reader.get(base + _path("state", example.type, example.state_key))))
    for content in found:
        if _without_profile(example, content) != example.content:
            return f"other content: {json.dumps(content, ensure_ascii=False)}", ""
    added = sorted(found[0].keys() - example.content.keys()) if isinstance(found[0], dict) else []
    return None, f"({', '.join(added)} added)" if added else ""


def _without_profile(example: Example, content: Any) -> Any:
    if example.type != "m.room.member" or not isinstance(content, dict):
        return content
    return {k: v for k, v in content.items() if k in example.content or k not in PROFILE_KEYS}


def _create_room(bot: httpx.Client) -> str:
    response = bot.post("/_matrix/client/v3/createRoom", json={"preset": "private_chat"})
    return str(response.raise_for_status().json()["room_id"])


def _join(tour: _Tour, friend: Account) -> None:
    """The seed's invitation lets the friend in; if its row failed, the later rows need the friend anyway."""
    room = f"/_matrix/client/v3{_path('rooms', tour.room_id)}"
    if tour.friend.post(f"{room}/join", json={}).is_success:
        return
    tour.bot.post(f"{room}/invite", json={"user_id": friend.user_id}).raise_for_status()
    tour.friend.post(f"{room}/join", json={}).raise_for_status()


def _show_progress(rows: Iterator[Row], total: int, console: Console) -> list[Row]:
    done: list[Row] = []
    with _progress(console, "Sending the events of the documents through the bridge") as say:
        for row in rows:
            done.append(row)
            result = row.answer if row.seen is None else f"{row.answer}: {row.seen}"
            say(f"  {len(done):2}/{total} {row.label}: {result}")
    return done


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """A line that changes in place on a terminal; plain lines in a file or a pipe."""
    if not console.is_terminal:
        console.print(title)
        yield lambda line: console.print(Text(line), soft_wrap=True)
        return
    with console.status(title) as status:
        yield lambda line: status.update(Text(f"{title}\n{line}"))


def _table(rows: Sequence[Row], console: Console) -> Table:
    """Event ids are cut short where they would leave no room for the other columns."""
    table = Table(title="Each example of the documents, posted to the bridge, read from the room")
    table.add_column("Event", overflow="fold", min_width=23)
    table.add_column("Posted", overflow="fold")
    table.add_column("Answer", no_wrap=True, overflow="ellipsis", max_width=None if console.width >= WIDE else 16)
    table.add_column("Seen in the room", overflow="fold")
    for row in rows:
        seen = Text(f"✓ {row.note}".rstrip(), "green") if row.seen is None else Text(f"✗ {row.seen}", "red")
        table.add_row(Text(row.label), row.posted, Text(row.answer), seen)
    return table


def _print_hints(console: Console, target: str, api_key: str, homeserver_url: str, friend: Account) -> None:
    body = json.dumps({"msgtype": "m.text", "body": "Hello from curl"})
    lines = [
        "",
        "Try it:",
        f"curl -H 'X-API-Key: {api_key}' -d '{body}' {target}",
        "",
        f"See it in a Matrix client on this machine: homeserver {homeserver_url},",
        f"user {friend.user_id}, password {friend.password}",
        "Ctrl-C stops the bridge and the homeserver and removes what they stored.",
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _client(url: str, headers: dict[str, str]) -> httpx.Client:
    return httpx.Client(base_url=url, headers=headers, timeout=ANSWER_SECONDS, trust_env=False)


def _bearer(account: Account) -> dict[str, str]:
    return {"Authorization": f"Bearer {account.access_token}"}


def _path(*segments: str) -> str:
    return "".join("/" + quote(segment, safe="") for segment in segments)


def _json(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object. Raises httpx.DecodingError when it is not one."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise httpx.DecodingError(f"answered {response.status_code} without a JSON object")
    return answer


def _why(answer: Mapping[str, Any]) -> str:
    """A Matrix error in words, or the answer itself when it is not one."""
    if "errcode" in answer:
        return f"{answer['errcode']}: {answer.get('error', '')}"
    return json.dumps(answer, ensure_ascii=False)


def _describe(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
