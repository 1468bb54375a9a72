"""A message as people write it, read from JSON (contract §5), with every problem that it has. Pure."""

import mimetypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast, get_args

from flowbridge.errors import BadContent, Problem
from flowbridge.events.canonical_json import pointer
from flowbridge.events.reader import Reader, is_storable
from flowbridge.events.relations import MAX_BYTES, NONE, Binding, Target, is_name

T = TypeVar("T")

Format = Literal["text", "markdown", "html"]
OnUpdate = Literal["edit", "thread", "reply", "new"]

FORMATS = get_args(Format)
MSGTYPES = ("m.text", "m.notice", "m.emote")
ON_UPDATE = get_args(OnUpdate)
KEYS = (
    *FORMATS,
    *("title", "msgtype", "mentions", "reply_to", "thread", "edit", "key", "on_update", "attachments", "overflow"),
)
MAX_MENTIONS = 50  # one room member in 50 is a crowd: @room is for that
MAX_ATTACHMENTS = 20
MAX_TITLE = 500  # characters
RULE = "message"  # what Problem.schema says for these rules
ROOM = "@room"

_USER_ID = re.compile(r"@[^\s:\x00-\x1f]+:[^\s:\x00-\x1f/]+(:[0-9]{1,5})?")
_MXC = re.compile(r"mxc://[A-Za-z0-9.:\[\]-]{1,230}/[A-Za-z0-9_-]{1,230}")
_MIMETYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,100}/[A-Za-z0-9!#$&^_.+-]{1,100}")
_SOURCES = ("url", "data", "content_uri")  # of a file: it has one of them
_ATTACHMENT_KEYS = (*_SOURCES, "filename", "mimetype", "caption", "info")
_NUMBERS = ("size", "w", "h", "duration")  # of a file's info
_TARGET = "is no target: give an event id ($…), the id of a delivery, or key:NAME"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file of a message. `content_uri`: where the homeserver has it; empty until it does, and before that `url` or
    `data` (base64, or a Node-RED Buffer; as bytes, the file itself) says where it comes from.

    `filename`, `mimetype`: may be empty, until it is `named`. `info`: what is known of it (specification, `info` of
    m.image …). `file`: with which key it was encrypted (specification, EncryptedFile), if it was.
    """

    content_uri: str = ""
    filename: str = ""
    mimetype: str = ""
    caption: str = ""
    info: Mapping[str, int] | None = None
    url: str = ""
    data: Any = None
    file: Mapping[str, Any] | None = None

    @property
    def is_here(self) -> bool:
        """Whether the homeserver has it."""
        return bool(self.content_uri)

    @property
    def named(self) -> "Attachment":
        """With a type, which the name may say, and a name."""
        mimetype = self.mimetype or mimetypes.guess_type(self.filename)[0] or "application/octet-stream"
        filename = self.filename or f"file{mimetypes.guess_extension(mimetype) or ''}"
        return replace(self, filename=filename, mimetype=mimetype)


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody wants to say. `source`: the text in its format; empty where there are only attachments.

    `key`: a name of the caller's for what this is about; `on_update`: what the next message with it is to the first.
    """

    format: Format = "text"
    source: str = ""
    title: str = ""
    msgtype: str = "m.text"
    users: tuple[str, ...] = ()
    mentions_room: bool = False
    reply_to: Target | None = None
    thread: Target | None = None
    edit: Target | None = None
    key: str = ""
    on_update: OnUpdate = "edit"
    attachments: tuple[Attachment, ...] = ()
    overflow: str = ""

    @property
    def binding(self) -> Binding:
        """Of its first event."""
        if not (self.reply_to or self.thread or self.edit or self.key):
            return NONE
        return Binding(self.reply_to, self.thread, self.edit, key=self.key, on_update=self.on_update)

    @property
    def later_binding(self) -> Binding:
        """Of its other events: they belong to the same thread, and to nothing else."""
        return Binding(thread=self.thread)


def read(value: Mapping[str, Any], files: Sequence[Attachment] = ()) -> Message:
    """Read a message object; a key that holds null is absent. `files`: that came beside it, in a form.

    Raises BadContent with every problem.
    """
    if len(value) == 1 and not files:  # most messages: a text alone
        ((name, text),) = value.items()
        if name in FORMATS and isinstance(text, str) and text.strip() and is_storable(text):
            return Message(cast("Format", name), text)
    present = {name: item for name, item in value.items() if item is not None}
    reader = _Reader({**present, "attachments": files} if files else present, KEYS)
    message = reader.message()
    if reader.problems:
        raise BadContent(reader.problems)
    return message


class _Reader(Reader):
    rule = RULE

    def message(self) -> Message:
        format_, source = self._source()
        users, mentions_room = self._mentions()
        attachments = self._attachments()
        on_update = self.one_of("on_update", ON_UPDATE, "edit")
        message = Message(
            format=format_,
            source=source,
            title=self._title(),
            msgtype=self.one_of("msgtype", MSGTYPES, "m.text"),
            users=users,
            mentions_room=mentions_room,
            reply_to=self.target("reply_to"),
            thread=self.target("thread"),
            edit=self.target("edit"),
            key=self._key(),
            on_update=cast("OnUpdate", on_update),
            attachments=attachments,
            overflow=self.one_of("overflow", ("file",), ""),
        )
        self._check_together()
        return message

    def _source(self) -> tuple[Format, str]:
        named: list[Format] = [name for name in FORMATS if name in self._value]
        for name in named[1:]:
            self.problem(name, f"is one too many: there is {named[0]} already, and a message has one text")
        if not named:
            if not self._value.get("attachments"):
                self.problem("", "has nothing to say: give text, markdown or html")
            return "text", ""
        source = self.text(named[0])
        if not source.strip() and isinstance(self._value[named[0]], str):
            self.problem(named[0], "is empty")
        return named[0], source

    def _title(self) -> str:
        title = self.text("title").strip()
        if len(title) > MAX_TITLE:
            self.problem("title", f"is longer than {MAX_TITLE} characters: put the rest into the text")
        elif len(title.splitlines()) > 1:
            self.problem("title", "is one line: put the rest into the text")
        return title

    def _mentions(self) -> tuple[tuple[str, ...], bool]:
        given = self._value.get("mentions", [])
        if isinstance(given, str):
            given = [each.strip() for each in given.split(",") if each.strip()]
        if not isinstance(given, list):
            self.problem("mentions", f"must be a list of user ids (@name:server) and {ROOM}")
            return (), False
        if len(given) > MAX_MENTIONS:
            self.problem("mentions", f"are more than {MAX_MENTIONS}: {ROOM} is for everybody in the room")
            return (), False
        for index, each in enumerate(given):
            if each != ROOM and not is_user_id(each):
                at = pointer(pointer(self._at, "mentions"), index)
                self.problems.append(Problem(at, f"is no user id: write it as @name:server, or {ROOM}", RULE))
        users = dict.fromkeys(each for each in given if isinstance(each, str) and each != ROOM)
        return tuple(users), ROOM in given

    def target(self, name: str) -> Target | None:
        """An event that the message refers to."""
        if name not in self._value:
            return None
        value = self._value[name]
        found = Target.parse(value) if isinstance(value, str) else None
        if found is None:
            self.problem(name, _TARGET)
        return found

    def _key(self) -> str:
        if "key" not in self._value:
            if "on_update" in self._value:
                self.problem("on_update", "means nothing without a key: give one, too")
            return ""
        key = self.text("key")
        if key == "":
            self.problem("key", "is empty: omit it, or give what the message is about")
        elif not is_name(key):
            self.problem("key", f"must be at most {MAX_BYTES} bytes, without control characters")
        return key

    def _check_together(self) -> None:
        value = self._value
        if "edit" in value:
            for name in ("reply_to", "thread"):
                if name in value:
                    self.problem(name, "cannot stand beside edit: an edited message stays where it is")
            if "attachments" in value:
                self.problem("attachments", "cannot stand beside edit: an edit changes a text. Send them by themselves")
            if "key" in value:
                self.problem("key", "cannot stand beside edit: a key edits the message that it stands for by itself")
        has_text = any(name in value for name in FORMATS)
        for name in ("title", "mentions", "msgtype", "overflow"):
            if name in value and not has_text and value.get("attachments"):
                self.problem(name, "needs a text: give text, markdown or html, too")

    def _attachments(self) -> tuple[Attachment, ...]:
        given = self._value.get("attachments", [])
        at = pointer(self._at, "attachments")
        if not isinstance(given, list | tuple):
            self.problem("attachments", "must be a list of objects")
            return ()
        if len(given) > MAX_ATTACHMENTS:
            self.problem("attachments", f"are more than {MAX_ATTACHMENTS}: send the others with another message")
            return ()
        found = []
        for index, each in enumerate(given):
            here = pointer(at, index)
            if isinstance(each, Attachment):
                found.append(each)
                continue
            if not isinstance(each, dict):
                self.problems.append(Problem(here, "must be an object", RULE))
                continue
            present = {name: item for name, item in each.items() if item is not None}
            found.append(_Reader(present, _ATTACHMENT_KEYS, here, self.problems).attachment())
        return tuple(found)

    def attachment(self) -> Attachment:
        given = [name for name in _SOURCES if name in self._value]
        if not given:
            self.problem("", "is no file: give its url, its data (base64), or the content_uri that POST /media answers")
        for name in given[1:]:
            self.problem(name, f"is one too many: there is {given[0]} already, and a file has one source")
        uri = self.text("content_uri")
        if "content_uri" in self._value and not _MXC.fullmatch(uri):
            self.problem("content_uri", "is no address of a file at a homeserver: mxc://server/id")
        url = self.text("url")
        if "url" in self._value and not url.lower().startswith(("https://", "http://")):
            self.problem("url", "is no address of a file on the web: https://… or http://…")
        filename = self.text("filename")
        if filename and not is_name(filename):
            self.problem("filename", f"must be at most {MAX_BYTES} bytes, without control characters")
        mimetype = self.text("mimetype")
        if mimetype and not _MIMETYPE.fullmatch(mimetype):
            self.problem("mimetype", "is no media type: write it as image/png")
        of_info, info = self._info()
        data, caption = self._value.get("data"), self.text("caption")
        found = Attachment(uri, filename, mimetype or of_info, caption, info, url=url, data=data)
        return found.named if uri else found

    def _info(self) -> tuple[str, dict[str, int] | None]:
        """What the caller knows of a file that the homeserver has; of others it is found out."""
        given = self._value.get("info", {})
        if not isinstance(given, dict):
            self.problem("info", "must be an object, as POST /media answers it")
        elif given and "content_uri" not in self._value:
            self.problem("info", "stands beside content_uri alone: of any other file it is found out")
        elif given:
            present = {name: item for name, item in given.items() if item is not None}
            known = ("mimetype", *_NUMBERS)
            return _Reader(present, known, pointer(self._at, "info"), self.problems).info()
        return "", None

    def info(self) -> tuple[str, dict[str, int]]:
        """A media type, and the rest."""
        mimetype = self.text("mimetype")
        if mimetype and not _MIMETYPE.fullmatch(mimetype):
            self.problem("mimetype", "is no media type: write it as image/png")
        found: dict[str, int] = {}
        for name in _NUMBERS:
            value = self._value.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
                self.problem(name, "must be a whole number, not below 0")
            elif name in self._value:
                found[name] = value
        return mimetype, found


def is_user_id(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value.encode("utf-8", "replace")) <= MAX_BYTES
        and bool(_USER_ID.fullmatch(value))
    )


@dataclass(frozen=True, slots=True)
class Reaction:
    """`key`: what is shown, mostly an emoji."""

    target: Target
    key: str


@dataclass(frozen=True, slots=True)
class Redaction:
    target: Target
    reason: str = ""


def read_reaction(value: Mapping[str, Any]) -> Reaction:
    """Raises BadContent with every problem."""

    def read(reader: _Reader, target: Target) -> Reaction:
        key = reader.text("key")
        if not is_name(key):
            reader.problem("key", f"is what to react with, for instance ✅, in at most {MAX_BYTES} bytes")
        return Reaction(target, key)

    return _read(value, ("target", "key"), read)


def read_redaction(value: Mapping[str, Any]) -> Redaction:
    """Raises BadContent with every problem."""
    return _read(value, ("target", "reason"), lambda reader, target: Redaction(target, reader.text("reason")))


_NONE = Target("event", "$")


def _read(value: Mapping[str, Any], known: Sequence[str], read: Callable[[_Reader, Target], T]) -> T:
    reader = _Reader({name: item for name, item in value.items() if item is not None}, known)
    if (target := reader.target("target")) is None and "target" not in value:
        reader.problem("target", f"is required: {_TARGET.removeprefix('is no target: ')}")
    found = read(reader, target or _NONE)
    if reader.problems:
        raise BadContent(reader.problems)
    return found
