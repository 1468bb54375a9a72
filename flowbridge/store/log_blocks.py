"""What is in a piece of the delivery log, so that a search passes over pieces without a match.

An index by room, type or key would cost each insertion some 30 µs, because its entries come anywhere (SQLite, a
thousand rooms). Instead a Bloom filter tells of 4,096 events which values they have. It is made after them, beside the
writer, and takes some µs an event. A piece without one is searched. Each function is work on a connection.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b

from sqlalchemy import Connection, delete, func, select

from flowbridge.store import clock
from flowbridge.store.statements import insert
from flowbridge.store.tables import log_blocks, outbox

SIZE = 4_096  # ids of one block; another size makes all filters that there are wrong
BITS = 12  # of the filter for each value: a block of a hundred is searched in vain
READ = 64  # filters that are read at once
LONGEST = 4  # blocks that are searched at once
_COLUMNS = {"r": outbox.c.room_id, "t": outbox.c.event_type, "u": outbox.c.account, "a": outbox.c.api_key}
_COLUMNS["k"] = outbox.c.caller_key

Value = tuple[str, str]  # a letter of _COLUMNS, and what the column has
Block = tuple[int, bytes]


def missing(connection: Connection, limit: int) -> list[Block]:
    """Some blocks without a filter that are complete, with their filters."""
    first, last = connection.scalar(select(func.min(outbox.c.id))), connection.scalar(select(func.max(outbox.c.id)))
    if first is None or last is None:
        return []
    known = set(connection.scalars(select(log_blocks.c.block)))
    wanted = (block for block in range(first // SIZE, last // SIZE) if block not in known)
    found: list[Block] = []
    for block in wanted:
        rows = connection.execute(
            select(*_COLUMNS.values()).where(outbox.c.id >= block * SIZE, outbox.c.id < (block + 1) * SIZE)
        ).all()
        if rows and not _is_complete(connection, block):
            break
        columns = zip(_COLUMNS, zip(*rows, strict=True), strict=True) if rows else ()
        found.append((block, _filter({(letter, one) for letter, values in columns for one in values if one})))
        if len(found) == limit:
            break
    return found


def _is_complete(connection: Connection, block: int) -> bool:
    """Whether no other replica may still commit an event with an id of this block."""
    newest = select(outbox.c.accepted_at).where(outbox.c.id < (block + 1) * SIZE).order_by(outbox.c.id.desc())
    accepted_at = connection.scalar(newest.limit(1)) or 0
    return accepted_at < clock.now_ms() - clock.CLOCK_SKEW_MS


def add(connection: Connection, blocks: Sequence[Block]) -> None:
    values = [{"block": block, "filter": filter_} for block, filter_ in blocks]
    connection.execute(insert(connection, log_blocks).on_conflict_do_nothing(), values)


def forget(connection: Connection) -> int:
    """Delete the filters of blocks whose events are gone."""
    first = connection.scalar(select(func.min(outbox.c.id))) or 0
    return connection.execute(delete(log_blocks).where(log_blocks.c.block < first // SIZE)).rowcount


def windows(
    connection: Connection, wanted: Sequence[Collection[Value]], floor: int, before: int
) -> Iterator[tuple[int, int]]:
    """Where events may be that have one of each of these values: ids from the first up to below the second.

    The newest first; all within `floor` and `before`.
    """
    hashes = [[_positions(value) for value in values] for values in wanted]
    high = before
    while high > floor:
        top = (high - 1) // SIZE
        bottom = max(top - READ + 1, floor // SIZE)
        within = (log_blocks.c.block >= bottom, log_blocks.c.block <= top)
        rows = connection.execute(select(log_blocks.c.block, log_blocks.c.filter).where(*within))
        filters = {row.block: row.filter for row in rows}
        run: list[int] = []
        for block in range(top, bottom - 1, -1):
            known = filters.get(block)
            may_match = known is None or all(any(_has(known, one) for one in values) for values in hashes)
            if run and (not may_match or len(run) == LONGEST):
                yield max(run[-1] * SIZE, floor), min((run[0] + 1) * SIZE, before)
                run = []
            if may_match:
                run.append(block)
        if run:
            yield max(run[-1] * SIZE, floor), min((run[0] + 1) * SIZE, before)
        high = bottom * SIZE


def _filter(values: Iterable[Value]) -> bytes:
    positions = [_positions(value) for value in values]
    bits = 1 << max(6, (len(positions) * BITS - 1).bit_length())
    found = bytearray(bits // 8)
    for several in positions:
        for at in several:
            at &= bits - 1
            found[at >> 3] |= 1 << (at & 7)
    return bytes(found)


def _has(filter_: bytes, positions: Sequence[int]) -> bool:
    mask = len(filter_) * 8 - 1
    return all(filter_[(at & mask) >> 3] >> (at & 7) & 1 for at in positions)


def _positions(value: Value) -> tuple[int, ...]:
    letter, text = value
    digest = blake2b(f"{letter}{text}".encode(), digest_size=16).digest()
    return tuple(int.from_bytes(digest[at : at + 4], "big") for at in range(0, 16, 4))
