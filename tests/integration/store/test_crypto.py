"""The crypto store, on both engines: a lease of one owner, steps that are written whole, and what is read back."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Connection, Engine

from flowbridge.store import Database, crypto, outbox
from flowbridge.store.crypto import (
    Changes,
    DeviceLease,
    Index,
    StoredDevice,
    StoredOutbound,
    StoredRoomKey,
    StoredSession,
    StoredUser,
)
from flowbridge.store.tables import metadata
from tests.integration.store import events

ALICE = StoredDevice("@alice:hs", "PHONE", "pickle", "sealed", None)
LEASE_MS = 60_000


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        yield connection


def held(connection: Connection, owner: str = "me") -> DeviceLease:
    crypto.create(connection, "a", ALICE, 1)
    lease = crypto.claim(connection, "a", owner, LEASE_MS, alone=False)
    assert lease is not None
    return lease


def session(peer: str, name: str, used_at: int, pickle: str = "p") -> StoredSession:
    return StoredSession(peer, name, pickle, used_at)


def room_key(first_index: int, pickle: str = "p", peer: str = "P") -> StoredRoomKey:
    return StoredRoomKey("!r", "S", peer, pickle, "s", first_index, 1)


def test_an_account_has_one_device(connection: Connection) -> None:
    assert crypto.device(connection, "a") is None
    assert crypto.create(connection, "a", ALICE, 1)
    assert not crypto.create(connection, "a", ALICE._replace(device_id="OTHER"), 2)
    assert crypto.device(connection, "a") == ALICE


def test_one_process_at_a_time_acts_as_a_device(connection: Connection) -> None:
    mine = held(connection)
    assert crypto.claim(connection, "a", "other", LEASE_MS, alone=False) is None
    assert crypto.owner(connection, "a") == "me"
    assert crypto.renew(connection, mine, LEASE_MS)
    crypto.release(connection, mine)
    assert crypto.owner(connection, "a") is None
    theirs = crypto.claim(connection, "a", "other", LEASE_MS, alone=False)
    assert theirs is not None
    assert not crypto.renew(connection, mine, LEASE_MS)
    assert not crypto.write(connection, mine, Changes(since="mine"))
    assert crypto.write(connection, theirs, Changes(since="theirs"))
    stored = crypto.device(connection, "a")
    assert stored is not None
    assert stored.since == "theirs"


def test_a_lease_that_ran_out_goes_to_the_next(connection: Connection) -> None:
    crypto.create(connection, "a", ALICE, 1)
    mine = crypto.claim(connection, "a", "me", -1, alone=False)
    assert mine is not None
    assert not crypto.renew(connection, mine, LEASE_MS)
    assert crypto.write(connection, mine, Changes(since="still mine")), "until another has it"
    assert crypto.claim(connection, "a", "other", LEASE_MS, alone=False) is not None
    assert not crypto.write(connection, mine, Changes(since="not any more"))


def test_the_only_process_need_not_wait_for_a_dead_one(connection: Connection) -> None:
    dead = held(connection, "dead")
    assert crypto.claim(connection, "a", "me", LEASE_MS, alone=True) is not None
    assert not crypto.write(connection, dead, Changes())


def test_what_an_owner_began_before_it_claimed_again_is_void(connection: Connection) -> None:
    before = held(connection)
    after = held(connection)
    assert not crypto.write(connection, before, Changes())
    assert crypto.write(connection, after, Changes())


def test_nothing_of_a_step_is_written_without_the_lease(connection: Connection) -> None:
    lease = held(connection)
    crypto.release(connection, lease)
    changes = Changes(
        pickle="new",
        sessions=[session("P", "S", 1)],
        outbound=[StoredOutbound("!r", "S", "p", "s", 1, 1)],
        room_keys=[room_key(0)],
        users=[StoredUser("@b:hs", "x")],
        indexes=[Index("S", 0, "m")],
        ciphertext=("d", "c"),
    )
    assert not crypto.write(connection, lease, changes)
    assert crypto.device(connection, "a") == ALICE
    assert crypto.held(connection, "a") == {"room_keys": 0, "sessions": 0, "users": 0}
    assert crypto.outbound(connection, "a", "!r") is None
    assert crypto.ciphertext(connection, "d") is None
    assert crypto.index_mark(connection, "a", "S", 0) is None


def test_the_session_used_last_comes_first_and_old_ones_go(connection: Connection) -> None:
    lease = held(connection)
    crypto.write(connection, lease, Changes(sessions=[session("P", str(number), number) for number in range(9)]))
    crypto.write(connection, lease, Changes(sessions=[session("Q", "other", 1), session("P", "6", 20, "newer")]))
    found = crypto.sessions(connection, "a", ["P", "Q", "R"])
    assert [each.session_id for each in found if each.peer == "P"] == ["6", "8", "7", "5", "4"]
    assert found[0].pickle == "newer"
    assert [each.session_id for each in found if each.peer == "Q"] == ["other"]
    assert crypto.sessions(connection, "b", ["P"]) == []


def test_a_room_key_is_replaced_only_by_one_that_reads_more(connection: Connection) -> None:
    lease = held(connection)
    for first_index, pickle in [(5, "first"), (7, "less"), (5, "as much"), (2, "more")]:
        crypto.write(connection, lease, Changes(room_keys=[room_key(first_index, pickle)]))
        (key,) = crypto.room_keys(connection, "a", "!r", "S")
        assert key.pickle == ("more" if pickle == "more" else "first")


def test_a_room_key_of_another_device_stands_beside(connection: Connection) -> None:
    lease = held(connection)
    crypto.write(connection, lease, Changes(room_keys=[room_key(5, "hers"), room_key(0, "his", "Q")]))
    assert {key.peer: key.pickle for key in crypto.room_keys(connection, "a", "!r", "S")} == {"P": "hers", "Q": "his"}


def test_room_keys_are_paged_in_their_order(connection: Connection) -> None:
    lease = held(connection)
    names = [(room, name, peer) for room in ("!a", "!b") for name in ("S", "T") for peer in ("P", "Q")]
    keys = [StoredRoomKey(room, name, peer, "p", "s", 0, 1) for room, name, peer in reversed(names)]
    crypto.write(connection, lease, Changes(room_keys=keys))
    found, after = [], ("", "", "")
    while page := crypto.all_room_keys(connection, "a", after, 3):
        found += [key[:3] for key in page]
        after = page[-1][:3]
    assert found == names


def test_a_step_of_a_room_s_session_leaves_who_has_its_key(connection: Connection) -> None:
    lease = held(connection)
    begun = StoredOutbound("!r", "S", "0", "everyone", 0, 1)
    crypto.write(connection, lease, Changes(outbound=[begun, begun._replace(room_id="!other")]))
    crypto.write(connection, lease, Changes(outbound=[begun._replace(pickle="1", messages=1, shared=None)]))
    assert crypto.outbound(connection, "a", "!r") == begun._replace(pickle="1", messages=1)
    assert crypto.outbound(connection, "a", "!other") == begun._replace(room_id="!other")
    crypto.write(connection, lease, Changes(outbound=[begun._replace(session_id="T", pickle="2", shared=None)]))
    assert crypto.outbound(connection, "a", "!r") == begun._replace(pickle="1", messages=1), "of another session"


def test_users_are_outdated_until_they_are_known_again(connection: Connection) -> None:
    lease = held(connection)
    crypto.write(connection, lease, Changes(users=[StoredUser("@b:hs", "1"), StoredUser("@c:hs", "1")]))
    crypto.write(connection, lease, Changes(outdated={"@b:hs", "@stranger:hs"}))
    assert sorted(crypto.users(connection, "a")) == [("@b:hs", "1", 1), ("@c:hs", "1", 0)]
    crypto.write(connection, lease, Changes(users=[StoredUser("@b:hs", "2")], left={"@c:hs"}))
    assert crypto.users(connection, "a", ["@b:hs", "@c:hs"]) == [("@b:hs", "2", 0)]


def test_messages_for_a_device_are_kept_until_it_has_read_them(connection: Connection) -> None:
    lease = held(connection)
    for sealed in ("one", "two", "three"):
        crypto.keep_for_device(connection, "a", sealed)
    crypto.keep_for_device(connection, "b", "another's")
    (first, one), (second, two), _ = crypto.inbox(connection, "a")
    assert (one, two) == ("one", "two")
    crypto.release(connection, lease)
    assert not crypto.write(connection, lease, Changes(read=[first, second]))
    assert len(crypto.inbox(connection, "a")) == 3
    assert crypto.write(connection, held(connection, "other"), Changes(read=[first, second]))
    assert [sealed for _, sealed in crypto.inbox(connection, "a")] == ["three"]
    assert [sealed for _, sealed in crypto.inbox(connection, "b")] == ["another's"]


def test_the_first_event_of_an_index_stays_its_event(connection: Connection) -> None:
    lease = held(connection)
    crypto.write(connection, lease, Changes(indexes=[Index("S", 0, "first")]))
    crypto.write(connection, lease, Changes(indexes=[Index("S", 0, "second"), Index("S", 1, "second")]))
    assert [crypto.index_mark(connection, "a", "S", number) for number in range(3)] == ["first", "second", None]


def test_a_room_that_was_seen_encrypted_is_remembered(connection: Connection) -> None:
    assert crypto.room_settings(connection, "!r") is None
    crypto.note_room(connection, "!r", "{}")
    crypto.note_room(connection, "!r", '{"rotation_period_msgs": 5}')
    assert crypto.room_settings(connection, "!r") == '{"rotation_period_msgs": 5}'


def test_ciphertexts_go_when_their_events_are_queued_no_more(connection: Connection) -> None:
    lease = held(connection)
    outbox.insert_rows(connection, [events.event("queued", "a|!r"), events.event("sent", "a|!r", state="sent")])
    made = [("queued", "1"), ("sent", "2"), ("withdrawn", "3")]
    for each in made:
        crypto.write(connection, lease, Changes(ciphertext=each))
    again = Changes(ciphertext=("queued", "another"))
    crypto.write(connection, lease, again)
    assert again.existing == "1"
    assert crypto.forget_ciphertexts(connection) == 2
    assert [crypto.ciphertext(connection, name) for name, _ in made] == ["1", None, None]


def test_another_device_of_an_account_has_its_room_keys_and_nothing_else(connection: Connection) -> None:
    lease = held(connection)
    changes = Changes(
        sessions=[session("P", "S", 1)],
        room_keys=[room_key(0)],
        users=[StoredUser("@b:hs", "x")],
        outbound=[StoredOutbound("!r", "S", "p", "s", 1, 1)],
        ciphertext=("d", "c"),
    )
    crypto.write(connection, lease, changes)
    other = StoredDevice("@alice:hs", "DESK", "other", "s", None)
    assert not crypto.replace(connection, "a", other, 2, "another process")
    assert crypto.replace(connection, "a", other, 2, "me")
    assert not crypto.write(connection, lease, changes)
    assert crypto.device(connection, "a") == other
    assert crypto.held(connection, "a") == {"room_keys": 1, "sessions": 0, "users": 0}
    assert crypto.outbound(connection, "a", "!r") is None
    assert crypto.ciphertext(connection, "d") == "c"
    assert crypto.claim(connection, "a", "other", LEASE_MS, alone=False) is not None


def test_an_owner_is_asked_for_its_device(connection: Connection) -> None:
    held(connection)
    assert not crypto.is_asked_for(connection, "a")
    crypto.ask(connection, "a", 60_000)
    assert crypto.is_asked_for(connection, "a")
    crypto.ask(connection, "a", 0)
    assert not crypto.is_asked_for(connection, "a")


# the store against a model of it


NAMES = st.sampled_from(["x", "y", "z"])
NUMBERS = st.integers(0, 4)


class Model(RuleBasedStateMachine):
    """Two processes take turns at a device; what the model wrote while it held the lease is what the store has."""

    database: Database

    @initialize()
    def begin(self) -> None:
        self.count = 0
        self.engine = self.database.engine
        with self.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
            crypto.create(connection, "a", ALICE, 1)
        self.leases: dict[str, DeviceLease] = {}
        self.holder = ""
        self.sessions: dict[tuple[str, str], StoredSession] = {}
        self.keys: dict[str, StoredRoomKey] = {}
        self.users: dict[str, StoredUser] = {}
        self.marks: dict[int, str] = {}
        self.ciphertexts: dict[str, str] = {}
        self.since: str | None = None

    def new(self) -> str:
        self.count += 1
        return str(self.count)

    @rule(owner=st.sampled_from(["one", "other"]), alone=st.booleans())
    def claim(self, owner: str, alone: bool) -> None:
        with self.engine.begin() as connection:
            lease = crypto.claim(connection, "a", owner, LEASE_MS, alone=alone)
        assert (lease is not None) == (alone or self.holder in ("", owner))
        if lease is not None:
            self.leases[owner], self.holder = lease, owner

    @precondition(lambda self: self.holder)
    @rule()
    def release(self) -> None:
        with self.engine.begin() as connection:
            crypto.release(connection, self.leases[self.holder])
        self.holder = ""

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), peer=NAMES, name=NAMES, number=NUMBERS)
    def write(self, data: st.DataObject, peer: str, name: str, number: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.leases)))
        fresh = self.new()
        changes = Changes(
            since=fresh,
            sessions=[StoredSession(peer, f"{peer} {name}", fresh, self.count)],
            room_keys=[StoredRoomKey("!r", name, peer, fresh, "s", number, 1)],
            users=[StoredUser(name, fresh, number % 2)],
            outdated={peer},
            indexes=[Index("S", number, fresh)],
            ciphertext=(name, fresh),
        )
        with self.engine.begin() as connection:
            assert crypto.write(connection, self.leases[owner], changes) == (owner == self.holder)
        if owner == self.holder:
            self.apply(changes)

    def apply(self, changes: Changes) -> None:
        self.since = changes.since
        for each in changes.sessions:
            self.sessions[each.peer, each.session_id] = each
        for key in changes.room_keys:
            name = f"{key.session_id} {key.peer}"
            if name not in self.keys or key.first_index < self.keys[name].first_index:
                self.keys[name] = key
        for user in changes.users:
            self.users[user.user_id] = user
        for name in changes.outdated & self.users.keys():
            self.users[name] = self.users[name]._replace(outdated=1)
        for index in changes.indexes:
            self.marks.setdefault(index.message_index, index.mark)
        assert changes.ciphertext is not None
        name, content = changes.ciphertext
        assert changes.existing == self.ciphertexts.get(name)
        self.ciphertexts.setdefault(name, content)

    @invariant()
    def agrees(self) -> None:
        with self.engine.begin() as connection:
            device = crypto.device(connection, "a")
            assert device is not None
            assert device.since == self.since
            found = crypto.sessions(connection, "a", ["x", "y", "z"])
            assert {(each.peer, each.session_id): each for each in found} == self.sessions
            keys = [key for name in ("x", "y", "z") for key in crypto.room_keys(connection, "a", "!r", name)]
            assert {f"{key.session_id} {key.peer}": key for key in keys} == self.keys
            assert {user.user_id: user for user in crypto.users(connection, "a")} == self.users
            marks = {number: crypto.index_mark(connection, "a", "S", number) for number in range(5)}
            assert {number: mark for number, mark in marks.items() if mark} == self.marks
            contents = {name: crypto.ciphertext(connection, name) for name in ("x", "y", "z")}
            assert {name: content for name, content in contents.items() if content} == self.ciphertexts
            assert (crypto.owner(connection, "a") or "") == self.holder


def test_the_store_keeps_what_the_holder_of_the_lease_wrote(url: str) -> None:
    database = Database(url)
    database.open()
    settings = hypothesis.settings(max_examples=10, stateful_step_count=15)
    kind: Any = type("Held", (Model,), {"database": database})
    try:
        hypothesis.stateful.run_state_machine_as_test(kind, settings=settings)
    finally:
        database.close()
