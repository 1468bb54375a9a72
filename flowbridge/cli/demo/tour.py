"""What `flowbridge demo` shows: every event of the seed documents, sent to the bridge, found in the room."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowbridge.cli.demo.synapse import Account, LocalSynapse

Shape = Literal["whole event", "content", "flow message", "plain text"]

# Longer than the bridge itself waits for the homeserver, so that the bridge's answer is what a row shows.
ANSWER_SECONDS = 30
# Columns of a terminal that whole event ids fit into.
WIDE = 120
# What a homeserver puts into a membership by itself, out of the user's profile.
PROFILE_KEYS = frozenset({"displayname", "avatar_url"})


@dataclass(frozen=True)
class Example:
    """An event as a seed document prints it: `body` is all of it, `state_key` None for a message event."""

    name: str
    type: str
    content: Mapping[str, Any]
    state_key: str | None
    body: Mapping[str, Any]
    source: str

    @property
    def label(self) -> str:
        """The type and what tells events of one type apart: `m.room.message m.audio`."""
        detail = self.content.get("msgtype") or self.content.get("membership")
        return f"{self.type} {detail}" if detail else self.type


@dataclass(frozen=True)
class Row:
    """One line of the table; `seen` is None when the event is in the room as sent, else what is wrong."""

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


def load_examples(schemas_dir: Path) -> list[Example]:
    """The examples under `schemas_dir`/examples that a seed document prints, by file name; never none."""
    found = []
    for path in sorted((schemas_dir / "examples").glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        source = body.pop("$comment", "")
        if "seed " in source:
            found.append(_example(path.stem, body, source))
    if not found:
        raise FileNotFoundError(f"{schemas_dir}/examples holds no example of a seed document")
    return found


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
    """Send each example through the bridge, read it back, print the table; True when every row is right.

    With `hints` it says at the end how to go on by hand, which makes sense while the bridge keeps running.
    Raises httpx.HTTPError when the homeserver refuses the room itself: no row could be right then.
    """
    with ExitStack() as stack:
        editor = stack.enter_context(_client(bridge_url, {"X-API-Key": api_key}))
        as_bot = stack.enter_context(_client(homeserver.url, _bearer(bot)))
        as_friend = stack.enter_context(_client(homeserver.url, _bearer(friend)))
        tour = _Tour(_create_room(as_bot), editor, as_bot, as_friend)
        steps = [*examples, *LEGACY]
        rows = _show_progress(_rows(tour, steps, bot, friend), 1 + len(steps), console)
    console.print(_table(rows, wide=console.width >= WIDE))
    failed = sum(row.seen is not None for row in rows)
    summary = f"{len(rows) - failed} of {len(rows)} events are in the room {tour.room_id}"
    console.print(Text(summary), soft_wrap=True)
    if hints:
        _print_hints(console, bridge_url, homeserver.url, api_key, tour.room_id, friend)
    return not failed


def _example(name: str, body: dict[str, Any], source: str) -> Example:
    return Example(name, body["type"], body["content"], body.get("state_key"), body, source)


def _rows(tour: _Tour, examples: Sequence[Example], bot: Account, friend: Account) -> Iterator[Row]:
    """Each row as soon as it is known, in an order in which a homeserver accepts them.

    The bot's own joins first, then the friend's invitation, which the friend accepts; the power levels of
    2014 last, since they name nobody and take the sender's power away before room version 12.
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
    """State goes as whole events; messages take turns, and what is only text goes as text."""
    if example.state_key is not None:
        return "whole event"
    if example.content.keys() == {"msgtype", "body"} and example.content["msgtype"] == "m.text":
        return "plain text"
    shapes: tuple[Shape, ...] = ("whole event", "flow message", "whole event", "content")
    return shapes[messages_before % len(shapes)]


def _created(tour: _Tour, bot: Account) -> Row:
    """The homeserver makes m.room.create; its `creator` of 2014 is the sender since room version 11."""
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
    """httpx's arguments for one of the four shapes of a body (contract: what a body may be)."""
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
def _progress(console: Console, title: str) -> Iterator[Any]:
    """A line that changes in place on a terminal; plain lines where a file or a pipe takes them."""
    if not console.is_terminal:
        console.print(title)
        yield lambda line: console.print(Text(line), soft_wrap=True)
        return
    with console.status(title) as status:
        yield lambda line: status.update(Text(f"{title}\n{line}"))


def _table(rows: Sequence[Row], *, wide: bool) -> Table:
    """Event ids are cut short where they would leave no room for the other columns."""
    table = Table(title="Each example of the documents, posted to the bridge, read from the room")
    table.add_column("Event", overflow="fold", min_width=23)
    table.add_column("Posted", overflow="fold")
    table.add_column("Answer", no_wrap=True, overflow="ellipsis", max_width=None if wide else 16)
    table.add_column("Seen in the room", overflow="fold")
    for row in rows:
        seen = Text(f"✓ {row.note}".rstrip(), "green") if row.seen is None else Text(f"✗ {row.seen}", "red")
        table.add_row(Text(row.label), row.posted, Text(row.answer), seen)
    return table


def _print_hints(
    console: Console, bridge_url: str, homeserver_url: str, api_key: str, room_id: str, friend: Account
) -> None:
    body = json.dumps({"msgtype": "m.text", "body": "Hello from curl"})
    target = f"{bridge_url}{_path('rooms', room_id, 'send', 'm.room.message')}"
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
    """The answer's object; an error that says what came instead when it is none."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise httpx.DecodingError(f"answered {response.status_code} without a JSON object")
    return answer


def _why(answer: Mapping[str, Any]) -> str:
    """A Matrix error in words, or the answer itself when it is none."""
    if "errcode" in answer:
        return f"{answer['errcode']}: {answer.get('error', '')}"
    return json.dumps(answer, ensure_ascii=False)


def _describe(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


def _state_of_2014(event_id: str, event_type: str, content: dict[str, int]) -> Example:
    body = {
        "content": content,
        "event_id": event_id,
        "required_power_level": 10,
        "room_id": "!MkDbyRqnvTYnoxjLYx:localhost",
        "state_key": "",
        "ts": 1409665585188,
        "type": event_type,
        "user_id": "@example:localhost",
    }
    return _example(event_type, body, "seed 004_4d6fafe6184dec7b.txt")


# State of the guide that m.room.power_levels has long replaced: of no type that the catalogue knows.
LEGACY = (
    _state_of_2014("WpmTgsNWUZ", "m.room.add_state_level", {"level": 10}),
    _state_of_2014("qUMBJyKsTQ", "m.room.send_event_level", {"level": 0}),
    _state_of_2014("YAaDmKvoUW", "m.room.ops_levels", {"ban_level": 5, "kick_level": 5}),
)
