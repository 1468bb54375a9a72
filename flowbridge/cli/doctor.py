"""`flowbridge doctor`: check the settings against the real homeserver, one line per check."""

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from flowbridge import log
from flowbridge.auth.tokens import cipher, secret_key
from flowbridge.bridge import Core
from flowbridge.cli import FAILED, bot_rooms
from flowbridge.cli.findings import Finding, show
from flowbridge.delivery.backpressure import used_bytes
from flowbridge.errors import MatrixError
from flowbridge.homeserver import AddressError, AddressUnknown
from flowbridge.homeserver.pool import Answer
from flowbridge.hooks.rooms import HookRooms
from flowbridge.models import Caller
from flowbridge.settings import Settings, SettingsError
from flowbridge.store import StoreAbsent, StoreError, accounts, api_keys, crypto, hooks, outbox
from flowbridge.store.accounts import account_of
from flowbridge.store.engine import place, reason

MAX_CLOCK_SECONDS = 60
DEAD = (
    "`flowbridge deliveries list --state dead` says why, `deliveries replay --dead` sends them again, "
    "`deliveries purge --state dead` deletes them"
)
MAX_ASKED = 20  # accounts whose tokens are checked, those with the most events; rooms of hooks


def run(settings: Settings, *, in_json: bool = False) -> int:
    """Print the findings; returns the exit code: 1 when one of them is bad."""
    log.setup(settings.log_format, "error")
    findings = asyncio.run(_examine(Core(settings)))
    show(findings, in_json=in_json)
    return FAILED if any(finding.good is False for finding in findings) else 0


async def _examine(core: Core) -> list[Finding]:
    findings = [
        *_settings(core.settings),
        Finding("schemas", True, f"{len(core.catalogue)} schemas are read and sound"),
    ]
    findings += _store(core)
    findings += await _hooks(core)
    try:
        address = await core.locator.address()
    except (AddressError, AddressUnknown) as error:
        return [*findings, Finding("address", False, str(error))]
    through = f", through the proxy {core.locator.proxy}" if core.locator.proxy else ""
    findings.append(Finding("address", True, f"{core.settings.base_url} is {address}{through}"))
    try:
        answer = await core.homeserver.versions()
    except MatrixError as error:
        return [*findings, Finding("versions", False, error.error)]
    findings += _versions(answer)
    findings += await _account(core)
    findings += await _waiting(core)
    core.homeserver.close()
    return findings


def _settings(settings: Settings) -> Iterator[Finding]:
    """Variables whose names are near misses, and a homeserver that was not named."""
    for variable, meant in settings.misnamed().items():
        yield Finding("settings", None, f"{variable} is not a setting{f': set {meant}' if meant else ''}")
    if name := settings.unused_proxy:
        yield Finding(
            "proxy", None, f"{name} is not used: if the homeserver is behind that proxy, set FLOWBRIDGE_PROXY"
        )
    if "base_url" not in settings.model_fields_set:
        yield Finding("settings", None, f"BASE_URL is not set: the default {settings.base_url} is used")


def _store(core: Core) -> list[Finding]:
    """The database, and what was given up in it; a server may be running on it."""
    try:
        core.database.open(shared=True)
        core.tokens.unlock(cipher(core.settings))
        with core.database.reading() as connection:
            queued = sum(number for number, _ in outbox.queued(connection).values())
            dead, used = outbox.dead(connection), used_bytes(connection, core.settings.max_database_bytes)
    except StoreAbsent as error:
        file = core.settings.database_file
        if file is not None and not os.access(file.absolute().parent, os.W_OK | os.X_OK):
            return [Finding("store", False, f"FLOWBRIDGE_DATABASE_URL: {file} is not there, and cannot be made")]
        return [Finding("store", None, f"FLOWBRIDGE_DATABASE_URL: {error}")]  # yet
    except StoreError as error:
        return [Finding("store", False, f"FLOWBRIDGE_DATABASE_URL: {error}")]
    except SettingsError as error:
        return [Finding("store", False, str(error))]
    except SQLAlchemyError as error:
        return [Finding("store", False, reason(error))]
    full, room = _space(core.settings, used)
    found = [Finding("store", not full, f"{place(core.database.url)}: {queued} queued, {dead} dead letters, {room}")]
    if dead:
        found.append(Finding("dead letters", False, f"{dead}: {DEAD}"))
    return found


def _space(settings: Settings, used: int) -> tuple[bool, str]:
    """Whether the bridge accepts nothing more for want of space, and how much there is."""
    most, least = settings.max_database_bytes, settings.min_free_disk_bytes
    full, says = used >= most, f"{_size(used)} of at most {_size(most)} used"
    if settings.database_file is not None:
        free = shutil.disk_usage(settings.database_file.absolute().parent).free
        full, says = full or free < least, f"{says}, {_size(free)} free on its disk ({_size(least)} are left free)"
    return full, f"{says}: nothing more is accepted" if full else says


def _size(number: int) -> str:
    size, units = float(number), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _versions(answer: Answer) -> Iterator[Finding]:
    import json

    try:
        versions = [str(version) for version in json.loads(answer.body)["versions"]]
    except (ValueError, KeyError, TypeError):
        yield Finding("versions", False, "the answer to /_matrix/client/versions is not a homeserver's")
        return
    modern = any(version.startswith("v1.") for version in versions)
    says = f"the homeserver speaks {versions[-1] if versions else 'no version'}"
    yield Finding("versions", modern, says if modern else f"{says}: flowbridge needs v1.1 or later")
    yield _clock(answer.header(b"date"))


def _clock(date: str) -> Finding:
    """Token lifetimes and webhook signatures depend on the clock."""
    try:
        away = time.time() - parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return Finding("clock", None, "the homeserver's answer has no Date to compare with")
    good = abs(away) <= MAX_CLOCK_SECONDS
    return Finding(
        "clock", good, f"this machine's clock is {abs(away):.0f} s {'ahead of' if away > 0 else 'behind'} it"
    )


async def _hooks(core: Core) -> list[Finding]:
    """hooks.yaml, and hooks whose template failed or whose secret cannot be read."""
    findings = []
    fernet = None
    try:
        fernet = cipher(core.settings) if core.database.is_open else None
        if fernet is not None:
            core.registry.open(fernet)
        fixed = core.registry.load()
        await core.administration.check_file(fixed)
        if core.settings.hooks_file is not None:
            findings.append(Finding("hooks", True, f"{core.settings.hooks_file}: {len(fixed)} hooks"))
    except SettingsError as error:
        findings.append(Finding("hooks", False, str(error)))
    finally:
        await core.rendering.stop()
    if fernet is not None:
        with core.database.reading() as connection:
            failing, unreadable = hooks.failing(connection), core.registry.unreadable(connection)
        for name, failure in sorted(failing.items()):
            why = failure.partition(" sent: ")[2] or failure
            says = f"the template of {name} failed, and a summary was sent: {why}"
            findings.append(Finding("hooks", False, f"{says}; `flowbridge hooks preview {name}` tries it"))
        for name in unreadable:
            says = f"the secret of {name} was written with another FLOWBRIDGE_SECRET_KEY: set that one, or"
            findings.append(Finding("hooks", False, f"{says} `flowbridge hooks rotate {name}`"))
    return findings


async def _hook_rooms(core: Core) -> list[Finding]:
    """Where hooks send to, and what keeps the bot from that: their senders are answered 200 all the same."""
    if not core.database.is_open:
        return []
    with core.database.reading() as connection:
        found = {entry.hook.name: entry.hook.room for entry in hooks.every(connection)}
    with contextlib.suppress(SettingsError):  # _hooks has said it
        found |= {name: each.hook.room for name, each in core.registry.load().items()}
    of_rooms: dict[str, list[str]] = {}
    for name, room in sorted(found.items()):
        of_rooms.setdefault(room, []).append(name)
    rooms = HookRooms(core.callers, core.room_access, core.homeserver)
    findings = []
    for room, names in list(of_rooms.items())[:MAX_ASKED]:
        if wrong := await rooms.standing(room):
            more = f" and {len(names) - 1} more" if names[1:] else ""
            findings.append(Finding("hooks", False, f"{names[0]}{more}: {wrong}"))
    if of_rooms and not findings:
        which = "their rooms" if len(of_rooms) <= MAX_ASKED else f"the first {MAX_ASKED} of their {len(of_rooms)} rooms"
        findings.append(Finding("hooks", True, f"{len(found)}; the bot is in {which}"))
    return findings


async def _account(core: Core) -> list[Finding]:
    try:
        bot = await core.bot.caller()
    except MatrixError as error:
        return [Finding("token", False, error.error)]
    if bot is None:
        return [
            Finding("token", None, "no bot account is set (ACCESS_TOKEN): callers bring their own Matrix tokens"),
            _keys(core),
        ]
    rooms = await bot_rooms.look(core, bot)
    where = "" if rooms else "; it is in no room yet: invite it, or POST /join/{roomIdOrAlias}"
    return [
        Finding("token", True, f"it is {bot.user_id}'s, device {bot.device_id or 'none'}{where}"),
        _keys(core),
        await _rate_limit(core, bot.token, bot.user_id),
        *await _encryption(core, bot),
        *rooms,
        *await _hook_rooms(core),
    ]


async def _waiting(core: Core) -> list[Finding]:
    """The users whose queued events no token can send: neither one in the store nor the bot's is accepted."""
    if not core.database.is_open:
        return []
    with contextlib.suppress(MatrixError):
        if (bot := await core.bot.caller()) is not None:
            core.tokens.trust(bot)
    with core.database.reading() as connection:
        queued = accounts.queued(connection)
        kept = {account: accounts.tokens_of(connection, account) for account, _, _ in queued[:MAX_ASKED]}
    findings = []
    for account, user_id, number in queued[:MAX_ASKED]:
        whose, events = user_id or "an unknown account", "1 event waits" if number == 1 else f"{number} events wait"
        try:
            if core.tokens.knows(account) or await _has_good(core, kept[account]):
                continue
        except MatrixError as error:
            findings.append(Finding("queue", None, f"{events}, {whose}'s token cannot be checked: {error.error}"))
            continue
        findings.append(Finding("queue", False, f"{events} for a token of {whose}: none that is known is accepted"))
    if len(queued) > MAX_ASKED:
        findings.append(Finding("queue", None, f"{len(queued) - MAX_ASKED} more accounts have queued events"))
    return findings


async def _has_good(core: Core, kept: list[accounts.Stored]) -> bool:
    """Whether the homeserver accepts one of these tokens. Raises MatrixError when it does not answer that."""
    for stored in kept:
        known = core.tokens.opened(stored)
        try:
            if known is not None:
                await core.homeserver.whoami(known[2])
                return True
        except MatrixError as error:
            if error.status != 401:
                raise
    return False


def _keys(core: Core) -> Finding:
    if number := len(core.settings.api_keys):
        where = "in FLOWBRIDGE_API_KEYS"
    elif core.database.is_open:
        with core.database.reading() as connection:
            number = len(api_keys.valid(connection))
        where = "in the store"
    else:
        return Finding("api keys", None, "unknown without the store")
    if number and not core.settings.has_bot:
        return Finding("api keys", False, "there are keys, but no account to act as: set ACCESS_TOKEN")
    says = (
        f"{number} {where}" if number else "none yet: `flowbridge keys create` makes one, and so does the first `serve`"
    )
    return Finding("api keys", True if number else None, says)


async def _encryption(core: Core, bot: Caller) -> list[Finding]:
    """Whether others may rely on the bot's device, where it is to encrypt."""
    if core.devices is None or not core.database.is_open:
        return []
    from flowbridge.encryption import setup
    from flowbridge.encryption.olm import CryptoError
    from flowbridge.encryption.sealing import Seal

    account = account_of(bot.user_id)
    stored = await core.database.read(partial(crypto.device, account=account))
    if stored is None:
        when = "at its start" if core.settings.is_to_encrypt else "when it meets an encrypted room"
        return [Finding("encryption", None, f"there is no device yet: `flowbridge serve` makes it {when}")]
    try:
        report = await setup.report_of(
            stored, core.database, Seal(secret_key(core.settings)), core.devices.keeper.server
        )
    except CryptoError as error:
        return [Finding("encryption", False, str(error))]
    except MatrixError as error:
        return [Finding("encryption", None, error.error)]
    hint = setup.HINTS[report.standing]
    says = f"device {report.device_id} is {report.standing}{f': {hint}' if hint else ''}"
    if stored.device_id != bot.device_id:
        says += f"; the token is of device {bot.device_id}, which the bridge makes its own at its next start"
    return [Finding("encryption", report.standing == "signed", says)]


async def _rate_limit(core: Core, token: str, user_id: str) -> Finding:
    """Synapse tells administrators whether an account is exempt; other homeservers have no such request."""
    from urllib.parse import quote

    target = f"/_synapse/admin/v1/users/{quote(user_id, safe='')}/override_ratelimit"
    try:
        answer = await core.homeserver.call("GET", target, token=token)
    except MatrixError as error:
        return Finding("rate limit", None, error.error)
    if answer.status != 200:
        return Finding("rate limit", None, "only a server admin can tell whether this account is rate limited")
    exempt = b'"messages_per_second":0' in answer.body.replace(b" ", b"")
    return Finding("rate limit", True, "exempt" if exempt else "the homeserver's own limits hold for this account")
