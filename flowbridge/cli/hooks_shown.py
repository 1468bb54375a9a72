"""What `flowbridge hooks` prints: what scripts read on standard output, the rest beside it."""

import os
from collections.abc import Sequence
from typing import Any

from flowbridge.cli.terminal import as_json, note, printable, say
from flowbridge.settings import Settings

Json = dict[str, Any]


def base(settings: Settings) -> str:
    """Where the bridge is, as far as it is set: a command hears of no request that came to it."""
    if settings.public_url is not None:
        return settings.public_url
    host, port = os.environ.get("FLOWBRIDGE_HOST", ""), os.environ.get("FLOWBRIDGE_PORT", "8090")
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104 (compared with)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def made(hook: Json, settings: Settings, verb: str) -> None:
    note(f"The hook {hook['name']} is {verb}: what its sender posts appears in {hook['room']}.")
    _secret(hook, settings)


def rotated(hook: Json, settings: Settings) -> None:
    _, *older = hook["secrets"]
    until = f"The one before it is valid until {older[0]['until'][:19]}Z." if older else "No older one is valid."
    note(f"The hook {hook['name']} has a new secret. {until}")
    _secret(hook, settings)


def _secret(hook: Json, settings: Settings) -> None:
    """The URL, and a line to try it, alone on standard output; the rest beside it."""
    for warning in hook.get("warnings", ()):
        say(printable(warning))
    if "url" not in hook:
        return
    if hook["verification"]["scheme"] != "token":
        note(f"Its secret is {hook['secret']}")
        note("It is not shown again. The line below the URL tries the hook.")
    else:
        note("The URL holds its secret, and is not shown again. The line below it tries the hook.")
    if settings.public_url is None:
        note(
            f"{base(settings)} is where the bridge is assumed to be, since FLOWBRIDGE_PUBLIC_URL is not set: set it "
            "to the address that senders use. After `serve --port`, set FLOWBRIDGE_PORT, here as there."
        )
    print(hook["url"])
    print(hook["curl"], flush=True)


def in_json(found: Json) -> None:
    print(printable(as_json(found)))


def all_(found: Json) -> None:
    for warning in found.get("warnings", ()):
        say(printable(warning))
    rows: list[Sequence[str]] = [("NAME", "ROOM", "SOURCE", "SCHEME", "LAST USED", "REMARKS")]
    for hook in found["hooks"]:
        remarks = ["in hooks.yaml"] if hook["fixed"] else []
        remarks += ["hides one of the store"] if hook.get("hides_another") else []
        remarks += ["its template failed"] if "failure" in hook else []
        used = hook.get("used_at", "-")[:19]
        cells = (hook["name"], hook["room"], hook["source"], hook["verification"]["scheme"], used)
        rows.append((*map(printable, cells), ", ".join(remarks) or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def one(found: Json) -> None:
    for name, value in found.items():
        if name == "failure":
            value = f"{value.get('time', '')} {value['error']}".strip()
        elif name == "secrets":
            value = "; ".join(_age(each) for each in value) or "none: `flowbridge hooks rotate` makes one"
        elif isinstance(value, list):
            value = ", ".join(value) or "-"
        elif name == "verification":
            value = ", ".join((value["scheme"], *(f"{key} {each}" for key, each in value.items() if key != "scheme")))
        elif isinstance(value, dict):
            value = as_json(value)
        print(f"{name}: {printable(str(value) if not isinstance(value, bool) else 'yes' if value else 'no')}")


def _age(secret: Json) -> str:
    until = f" until {secret['until'][:19]}Z" if "until" in secret else ""
    return f"made {secret['created_at'][:19]}Z{until}"


def requests(found: Json) -> None:
    for each in found["requests"]:
        what = each.get("delivery_id") or each.get("done") or each.get("error", "")
        cells = (each["id"], each["received_at"], f"{each['size']} bytes", each.get("event") or each.get("source", ""))
        print("  ".join(printable(cell) for cell in (*cells, what) if cell))
    if not found["requests"]:
        say("none is kept")


def request(found: Json) -> None:
    for name, value in found["headers"].items():
        print(printable(f"{name}: {value}"))
    print()
    print(printable(found["body"]))
    if found["is_cut"]:
        say(f"the body is cut: it had {found['size']} bytes")


def preview(found: Json) -> None:
    for warning in found["warnings"]:
        say(printable(warning))
    if "done" in found:
        say(f"nothing would be sent: {printable(found['done'])}")
    for message in found["messages"]:
        print(printable(message["text"]))
