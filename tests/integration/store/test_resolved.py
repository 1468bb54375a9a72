"""flowbridge.store.resolved, on each engine: what one of several replicas does alone."""

from sqlalchemy import Engine, update

from flowbridge.store import resolved
from flowbridge.store.tables import resolved as names

NAME = "invitations|@bot:hs"


def claims(engine: Engine, owner: str, name: str = NAME) -> bool:
    with engine.begin() as connection:
        return resolved.claim(connection, name, owner, 60_000)


def test_claim_is_one_replicas_until_it_does_not_prolong_it(engine: Engine) -> None:
    assert claims(engine, "one")
    assert not claims(engine, "other")
    assert claims(engine, "one")
    assert claims(engine, "other", "invitations|@another:hs")
    with engine.begin() as connection:
        connection.execute(update(names).where(names.c.name == NAME).values(seen_at=names.c.seen_at - 61_000))
    assert claims(engine, "other")
    assert not claims(engine, "one")
    with engine.begin() as connection:
        resolved.release(connection, NAME, "one")
    assert not claims(engine, "one")
    with engine.begin() as connection:
        resolved.release(connection, NAME, "other")
    assert claims(engine, "one")
