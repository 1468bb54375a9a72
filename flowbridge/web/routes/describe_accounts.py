"""The OpenAPI operations of flowbridge.web.routes.accounts, in words."""

from typing import Any

from flowbridge.web.describe import UPSTREAM, Operation, as_json, operation, schema

_UPSTREAM = (400, *UPSTREAM)
_BODY = (408, 413, 415)

_TEXT = {"type": "string"}
_USER_ID = {**_TEXT, "examples": ["@example:localhost"]}
_ACCOUNT: Operation = {
    "type": "object",
    "required": ["user_id"],
    "properties": {
        "access_token": {**_TEXT, "examples": ["QGV4YW1wbGU6bG9jYWxob3N0.AqdSzFmFYrLrTmteXc"]},
        "device_id": _TEXT,
        "home_server": {**_TEXT, "examples": ["localhost"]},
        "user_id": _USER_ID,
    },
}
_AT_ONCE = {
    "user_id": {**_TEXT, "description": "A name, or a whole user id; without it the homeserver chooses one."},
    "password": {**_TEXT, "description": "Without it the account cannot be logged in to later."},
}
_FLOWS = {
    "type": "object",
    "required": ["flows"],
    "properties": {
        "flows": {"type": "array", "items": {"type": "object"}},
        "session": _TEXT,
        "params": {"type": "object"},
    },
}
_LOGIN = {
    "type": {**_TEXT, "examples": ["m.login.password"]},
    "user": {**_TEXT, "description": "A name or a user id; old clients send it instead of `identifier`."},
    "identifier": {"type": "object", "description": '`{"type": "m.id.user", "user": …}`, or by email or phone.'},
    "password": _TEXT,
    "device_id": _TEXT,
    "initial_device_display_name": _TEXT,
}
_WELL_KNOWN = {
    "type": "object",
    "description": "What clients should use from now on, where the homeserver says so: the bridge.",
}


def account(method: str, path: str) -> Operation:
    """The operation of one of the routes."""
    matrix = path.startswith("/_matrix/")
    surface, tag = ("matrix", "Matrix surface") if matrix else ("flow", "Flow surface")
    last = path.rpartition("/")[2]
    if last == "register":
        return _register(f"{surface}_register", tag, passes=matrix)
    return _REST[method, last](f"{surface}_{method.lower()}_{last}", tag)


def _register(id_: str, tag: str, *, passes: bool) -> Operation:
    at_once = (
        "The account is made in one call: flowbridge completes `m.login.dummy` itself. Where the homeserver asks for "
        "another stage, this is a 403 that names it."
    )
    found = operation(
        id_,
        tag,
        "Register an account",
        description=f"For a body with `user_id` and without `username` and `auth`, and on `api/v1` for every body: "
        f"{at_once} Everything else goes to the homeserver as it is."
        if passes
        else at_once,
        ok="The account.",
        answers=as_json(_ACCOUNT),
        errors=(*_UPSTREAM, *_BODY),
        body=_body(_AT_ONCE, {"user_id": "example", "password": "wordpass"}),
        open_to_all=True,
    )
    if passes:
        found["responses"]["401"] = {
            "description": "What the homeserver asks for (User-Interactive Authentication API). Or the credential that "
            "came with it is not accepted.",
            "content": as_json({"anyOf": [_FLOWS, schema("MatrixError")]}),
        }
    return found


def _flows(id_: str, tag: str) -> Operation:
    return operation(
        id_,
        tag,
        "The ways to log in",
        ok="The homeserver's own answer.",
        answers=as_json(_FLOWS),
        errors=_UPSTREAM,
        open_to_all=True,
    )


def _login(id_: str, tag: str) -> Operation:
    account = {**_ACCOUNT, "properties": {**_ACCOUNT["properties"], "well_known": _WELL_KNOWN}}
    return operation(
        id_,
        tag,
        "Log in",
        ok="The account.",
        answers=as_json(account),
        errors=(*_UPSTREAM, *_BODY),
        body=_body(_LOGIN, {"type": "m.login.password", "user": "example", "password": "wordpass"}),
        open_to_all=True,
    )


def _page(id_: str, tag: str) -> Operation:
    return operation(
        id_,
        tag,
        "Log in with a browser",
        ok="The homeserver's own page.",
        answers={"text/html": {"schema": _TEXT}},
        errors=_UPSTREAM,
        open_to_all=True,
    )


def _logout(id_: str, tag: str, *, whose: str = "this token") -> Operation:
    return operation(
        id_,
        tag,
        f"Log out: end {whose}",
        description="A body is not looked at. API keys do not log out: they are revoked.",
        ok="It is done.",
        answers=as_json({"type": "object"}),
        errors=(*_UPSTREAM, *_BODY),
    )


def _logout_all(id_: str, tag: str) -> Operation:
    return _logout(id_.replace("_all", "_logout_all"), tag, whose="all tokens of the user")


def _whoami(id_: str, tag: str) -> Operation:
    return operation(
        id_,
        tag,
        "Whose token this is",
        description="With an API key: the bot account, and in `flowbridge.key` what the key may do.",
        ok="The account.",
        answers=as_json({"type": "object", "required": ["user_id"], "properties": {"user_id": _USER_ID}}),
        errors=_UPSTREAM,
    )


def _body(properties: Any, example: Any) -> Operation:
    found = {"schema": {"type": "object", "properties": properties}, "example": example}
    return {"description": "Content-Type is not looked at.", "content": {"application/json": found}}


_REST = {
    ("GET", "login"): _flows,
    ("POST", "login"): _login,
    ("GET", "fallback"): _page,
    ("POST", "logout"): _logout,
    ("POST", "all"): _logout_all,
    ("GET", "whoami"): _whoami,
}
