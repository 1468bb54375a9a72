"""A running bridge in front of the real homeserver."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.models import ApiKey
from flowbridge.settings import Settings
from flowbridge.store import Database, api_keys
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.patience import PATIENCE

KEY = "fb_integration-key-of-32-characters-and-some-more"


def store_in(folder: Path) -> str:
    """The URL of a database there."""
    return f"sqlite:///{folder}/flowbridge.db"


def make_key(folder: Path, key: ApiKey) -> str:
    """The secret of this key, which is added to the store there, before any bridge opens it."""
    secret = api_keys.new_secret()
    database = Database(store_in(folder))
    database.open(shared=True, make=True)
    with database.engine.begin() as connection:
        api_keys.add(connection, key, secret)
    database.engine.dispose()
    return secret


@dataclass(frozen=True)
class Room:
    """A room on the real homeserver, seen without the bridge."""

    id: str
    owner: Account
    direct: httpx.Client

    @property
    def path(self) -> str:
        return f"/rooms/{quote(self.id, safe='')}"

    def event(self, event_id: str) -> dict[str, Any]:
        return self._get(f"event/{quote(event_id, safe='')}")

    def state(self, event_type: str, state_key: str = "") -> dict[str, Any]:
        return self._get(f"state/{event_type}/{quote(state_key, safe='')}")

    def messages(self) -> list[dict[str, Any]]:
        """All messages in the room, oldest first."""
        found: list[dict[str, Any]] = []
        page = self._get("messages?dir=f&limit=500")
        while page["chunk"]:
            found += [event for event in page["chunk"] if event["type"] == "m.room.message"]
            if "end" not in page:
                break
            page = self._get(f"messages?dir=f&limit=500&from={page['end']}")
        return found

    def bodies(self) -> list[str]:
        """Their texts."""
        return [event["content"]["body"] for event in self.messages()]

    def _get(self, path: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.owner.access_token}"}
        answer = self.direct.get(f"/_matrix/client/v3{self.path}/{path}", headers=headers)
        return dict(answer.raise_for_status().json())


@pytest.fixture(scope="session")
def owner(make_account: MakeAccount) -> Account:
    """The bridge's own account, and the owner of the rooms."""
    return make_account()


# Not for the whole session: see tests/http/conftest.py.
@pytest.fixture(scope="module")
def bridge_url(synapse: LocalSynapse, owner: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bridge")
    settings = Settings.load(
        base_url=synapse.url,
        access_token=owner.access_token,
        api_keys=[KEY],
        wait_seconds=PATIENCE,
        database_url=store_in(folder),
    )
    with background(settings) as url:
        yield url


@pytest.fixture
def bridge(bridge_url: str, owner: Account) -> Iterator[httpx.Client]:
    """A caller with the owner's own Matrix token."""
    headers = {"Authorization": f"Bearer {owner.access_token}"}
    with httpx.Client(base_url=bridge_url, headers=headers, trust_env=False) as client:
        yield client


@pytest.fixture
def anyone(bridge_url: str) -> Iterator[httpx.Client]:
    """A caller without a token."""
    with httpx.Client(base_url=bridge_url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def new_room(synapse: LocalSynapse, owner: Account, make_room: MakeRoom) -> Iterator[Callable[..., Room]]:
    with httpx.Client(base_url=synapse.url, trust_env=False) as direct:
        yield lambda **body: Room(make_room(owner, **body), owner, direct)


@pytest.fixture
def room(new_room: Callable[..., Room]) -> Room:
    return new_room()
