"""A hook as its owner writes it: JSON, or YAML, with every problem that it has. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from flowbridge import sources
from flowbridge.errors import BadContent, BadRequest, Problem
from flowbridge.events import message
from flowbridge.events.canonical_json import pointer
from flowbridge.events.reader import Reader
from flowbridge.homeserver import identifiers
from flowbridge.hooks import secrets
from flowbridge.models.hooks import KEPT_REQUESTS, SCHEMES, TOKEN, Hook, Mentions, OnUpdate, Per, Verification

KEYS = (
    *("name", "room", "source", "verification", "template", "per", "on_update", "mention", "mentions", "ignore"),
    "keep_requests",
)
VERIFICATION_KEYS = ("scheme", "secret", "header", "prefix", "encoding", "timestamp_header")
# What a template can make: a text for each. Files are none.
MEMBERS = tuple(key for key in message.KEYS if key != "attachments")
MAX_TEMPLATE_BYTES = 16 * 1024
MAX_MENTION = 50
MAX_IGNORED = 100
MAX_NAME = 100  # characters of a header, a prefix, an event
RULE = "hook"  # what Problem.schema says for these rules

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE = "must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit"

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")  # a token of RFC 9110, within our bound
_VISIBLE = re.compile(r"[\x21-\x7e]{0,100}")
# Beside the scheme and its secret: what a sender leaves to the hook's owner.
_OWN = {
    "hmac": ("header", "prefix", "encoding", "timestamp_header"),
    "grafana": ("timestamp_header",),
}


@dataclass(frozen=True, slots=True)
class Definition:
    """A hook, and its secrets as far as they were given: one, or two in hooks.yaml, the newest first."""

    hook: Hook
    secrets: tuple[str, ...] = ()


def read(value: Any, *, name: str | None = None, fixed: bool = False) -> Definition:
    """Read a hook; a key that holds null is absent. `name`: what the path calls it. `fixed`: it stands in hooks.yaml.

    Raises BadContent with every problem.
    """
    if not isinstance(value, Mapping):
        raise BadContent([Problem("", "must be an object", RULE)])
    present = {str(key): item for key, item in value.items() if item is not None}
    if name is not None:
        present.setdefault("name", name)
    reader = _Reader(present, KEYS)
    found = reader.definition(fixed=fixed)
    if name is not None and not reader.problems and found.hook.name != name:
        reader.problem("name", f"is not the one in the path, {name!r}: a hook keeps its name")
    if reader.problems:
        raise BadContent(reader.problems)
    return found


def to_json(hook: Hook) -> dict[str, Any]:
    """A hook as its owner may write it again; no secret."""
    own = _OWN.get(hook.verification.scheme, ())
    verification = {"scheme": hook.verification.scheme}
    verification |= {key: value for key in own if (value := getattr(hook.verification, key))}
    return {
        "name": hook.name,
        "room": hook.room,
        "source": hook.source,
        "verification": verification,
        "template": dict(hook.template) if hook.template else None,
        "per": hook.per,
        "on_update": hook.on_update,
        "mention": list(hook.mention),
        "mentions": hook.mentions,
        "ignore": list(hook.ignore),
        "keep_requests": hook.keep_requests,
    }


def unknown(value: Mapping[str, Any], known: Sequence[str]) -> list[Problem]:
    """A problem for each key that is none of these."""
    return _Reader({str(key): item for key, item in value.items()}, known).problems


class _Reader(Reader):
    rule = RULE

    def definition(self, *, fixed: bool) -> Definition:
        verification, given = self._verification(fixed=fixed)
        hook = Hook(
            name=self._name(),
            room=self._room(),
            source=self.one_of("source", sources.NAMES, sources.AUTO),
            verification=verification,
            template=self._template(),
            per=cast("Per", self.one_of("per", get_args(Per), "notification")),
            on_update=cast("OnUpdate", self.one_of("on_update", get_args(OnUpdate), "edit")),
            mention=self._mention(),
            mentions=cast("Mentions", self.one_of("mentions", get_args(Mentions), "firing")),
            ignore=self._ignore(),
            keep_requests=self._keep_requests(),
            is_fixed=fixed,
        )
        return Definition(hook, given)

    def _name(self) -> str:
        if "name" not in self._value:
            self.problem("name", "is required: it stands in the hook's URL")
            return ""
        name = self._value["name"]
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self.problem("name", NAME_RULE)
            return ""
        return name

    def _room(self) -> str:
        if "room" not in self._value:
            self.problem("room", "is required: where its messages go (!id, #alias:server, or @user:server)")
            return ""
        room = self.text("room")
        if isinstance(self._value["room"], str):
            try:
                return identifiers.room_or_user(room.replace("%", "%25"))
            except (BadRequest, UnicodeError) as error:
                wrong = error.error if isinstance(error, BadRequest) else "it is not Unicode text"
                self.problem("room", f"names no room: {wrong}")
        return ""

    def _verification(self, *, fixed: bool) -> tuple[Verification, tuple[str, ...]]:
        value = self._value.get("verification", {})
        if isinstance(value, str):
            value = {"scheme": value}
        if not isinstance(value, Mapping):
            self.problem("verification", 'must be an object: {"scheme": …}')
            return Verification(), ()
        present = {str(key): item for key, item in value.items() if item is not None}
        at = pointer(self._at, "verification")
        return _Reader(present, VERIFICATION_KEYS, at, self.problems).verification(fixed=fixed)

    def verification(self, *, fixed: bool) -> tuple[Verification, tuple[str, ...]]:
        scheme = self.one_of("scheme", SCHEMES, TOKEN)
        own = _OWN.get(scheme, ())
        for name in VERIFICATION_KEYS[2:]:
            if name in self._value and name not in own and self._value.get("scheme", TOKEN) in SCHEMES:
                schemes = " and ".join(each for each, names in _OWN.items() if name in names)
                self.problem(name, f"means nothing with the scheme {scheme}: it is for {schemes}")
        for name in ("header", "timestamp_header"):
            if name in own and name in self._value and not _HEADER.fullmatch(self.text(name)):
                self.problem(name, f"is no name of a header: up to {MAX_NAME} letters, digits and -")
        if scheme == "hmac" and "header" not in self._value:
            self.problem("header", "is required with the scheme hmac: the header that holds the signature")
        if not _VISIBLE.fullmatch(self.text("prefix")):
            self.problem("prefix", f"must be up to {MAX_NAME} characters of visible ASCII, as sha256=")
        encoding = self.one_of("encoding", ("hex", "base64"), "hex")
        found = Verification(
            scheme,
            self.text("header"),
            self.text("prefix"),
            cast("Any", encoding),
            self.text("timestamp_header"),
        )
        return found, self._secrets(scheme, fixed=fixed)

    def _secrets(self, scheme: str, *, fixed: bool) -> tuple[str, ...]:
        """In hooks.yaml there may be two, the newest first."""
        given = self._value.get("secret")
        several = given if isinstance(given, list) and fixed else [given] if given is not None else []
        if fixed and isinstance(given, list) and not 1 <= len(given) <= 2:
            self.problem("secret", "must be one, or a list of two while the older one is being replaced")
            return ()
        for secret in several:
            if not isinstance(secret, str):
                self.problem("secret", "must be a string")
                return ()
            if wrong := secrets.problem(secret, scheme):
                self.problem("secret", wrong)
                return ()
        return tuple(dict.fromkeys(several))

    def _template(self) -> Mapping[str, str] | None:
        value = self._value.get("template")
        if isinstance(value, str):
            value = {"markdown": value}
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            self.problem("template", "must be a string, or an object of templates for members of a message")
            return None
        present = {str(key): item for key, item in value.items() if item is not None}
        reader = _Reader(present, MEMBERS, pointer(self._at, "template"), self.problems)
        found = {name: reader.text(name) for name in present}
        texts = [name for name in message.FORMATS if name in present]
        for name in texts[1:]:
            reader.problem(name, f"is one too many: there is {texts[0]} already, and a message has one text")
        if not texts:
            reader.problem("", "makes no text: give text, markdown or html")
        size = sum(len(each.encode("utf-8", "replace")) for each in found.values())
        if size > MAX_TEMPLATE_BYTES:
            reader.problem("", f"is longer than {MAX_TEMPLATE_BYTES // 1024} KiB")
        return found

    def _mention(self) -> tuple[str, ...]:
        given = self._value.get("mention", [])
        if isinstance(given, str):
            given = [each.strip() for each in given.split(",") if each.strip()]
        if not isinstance(given, list):
            self.problem("mention", f"must be a list of user ids (@name:server) and {message.ROOM}")
            return ()
        if len(given) > MAX_MENTION:
            self.problem("mention", f"are more than {MAX_MENTION}: {message.ROOM} is for everybody in the room")
            return ()
        for index, each in enumerate(given):
            if each != message.ROOM and not message.is_user_id(each):
                self.problem_in("mention", index, f"is no user id: write it as @name:server, or {message.ROOM}")
        return tuple(dict.fromkeys(each for each in given if isinstance(each, str)))

    def _ignore(self) -> tuple[str, ...]:
        given = self._value.get("ignore", [])
        if not isinstance(given, list):
            self.problem("ignore", "must be a list of the sender's names of events, as push or issues.opened")
            return ()
        if len(given) > MAX_IGNORED:
            self.problem("ignore", f"are more than {MAX_IGNORED}: let the sender send fewer kinds of events")
            return ()
        for index, each in enumerate(given):
            if not isinstance(each, str) or not 0 < len(each) <= MAX_NAME or not each.isprintable():
                self.problem_in("ignore", index, f"is no name of an event: a string of up to {MAX_NAME} characters")
        return tuple(dict.fromkeys(each for each in given if isinstance(each, str)))

    def _keep_requests(self) -> int:
        value = self._value.get("keep_requests", True)
        if isinstance(value, bool):
            return KEPT_REQUESTS if value else 0
        if not isinstance(value, int) or not 0 <= value <= KEPT_REQUESTS:
            self.problem("keep_requests", f"must be a number from 0 to {KEPT_REQUESTS}, or true or false")
            return 0
        return value

    def problem_in(self, name: str, index: int, wrong: str) -> None:
        """Of one item of a list."""
        _Reader({}, (), pointer(self._at, name), self.problems).problem(str(index), wrong)
