"""The deliveries that the options of `flowbridge deliveries` select."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote

from flowbridge.cli import Usage
from flowbridge.cli.store import opened
from flowbridge.cli.terminal import as_text, printable
from flowbridge.errors import BadRequest, MatrixError
from flowbridge.homeserver import identifiers
from flowbridge.services import delivery_views
from flowbridge.services.delivery_views import states
from flowbridge.settings import Settings
from flowbridge.store import resolved
from flowbridge.store.delivery_log import Selection


def select(
    *,
    state: Sequence[str] = (),
    room: str = "",
    event_type: str = "",
    key: str = "",
    hook: str = "",
    since: str = "",
    text: str = "",
) -> Selection:
    """Raises Usage. A room that is named by an alias is still to be `located`."""
    try:
        named = _room(room) if room else ""
        is_alias = named.startswith("#")
        return Selection(
            states=states(",".join(state), "--state"),
            room_id=named if named and not is_alias else None,
            alias=named if is_alias else None,
            event_type=identifiers.identifier(event_type, "--type") if event_type else None,
            key=identifiers.identifier(as_text(key), "--key") if key else None,
            hook=identifiers.identifier(as_text(hook), "--hook") if hook else None,
            since=delivery_views.since(since, "--since") if since else None,
            text=delivery_views.text(as_text(text), "--q") if text else None,
        )
    except BadRequest as error:
        raise Usage(error.error) from None


def _room(room: str) -> str:
    room = identifiers.identifier(as_text(room), "--room")
    try:
        return identifiers.room(quote(room))
    except BadRequest as error:
        raise BadRequest(f"--room: {printable(error.error)}") from None


def located(settings: Settings, selection: Selection) -> Selection:
    """The selection with the id of its room. Raises Usage when it is not known where the alias leads.

    The homeserver says it; while it cannot be asked, what it said before.
    """
    alias = selection.alias
    if alias is None:
        return selection
    try:
        return replace(selection, room_id=asyncio.run(_ask(settings, alias)))
    except MatrixError as error:
        with opened(settings) as database, database.reading() as connection:
            known = resolved.leads(connection, alias)
        if len(known) != 1:
            raise Usage(
                f"--room: where {printable(alias)} leads is not known ({printable(error.error)}): name the room's id, "
                "as `flowbridge deliveries list` shows it"
            ) from None
        return replace(selection, room_id=known.pop())


async def _ask(settings: Settings, alias: str) -> str:
    from flowbridge.bridge import Core

    core = Core(settings)
    try:
        bot = await core.bot.caller()
        if bot is None:
            raise MatrixError("the bridge has no account to ask with: set ACCESS_TOKEN")
        return await core.homeserver.resolve(bot.token, alias)
    finally:
        core.homeserver.close()


def ago(text: str, option: str) -> int:
    """The time that was so long ago (`90m`, `7d`), as ms since 1970. Raises Usage."""
    if (found := delivery_views.age(text)) is None:
        raise Usage(f"{option}: {text[:80]!r} is not an age: write it like 90m, 12h or 7d")
    return found
