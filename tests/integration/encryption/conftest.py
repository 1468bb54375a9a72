from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from tests.conftest import MakeAccount
from tests.integration.encryption.bot import Bot, sqlite
from tests.peer import Peer


@pytest.fixture(scope="session")
def peer(synapse: LocalSynapse, make_account: MakeAccount) -> Iterator[Peer]:
    """Alice, for all tests: each has a room of its own."""
    with Peer(synapse.url, make_account()) as peer:
        yield peer


@pytest.fixture(scope="session")
def open_peer(synapse: LocalSynapse, make_account: MakeAccount) -> Iterator[Peer]:
    """One that also trusts devices that their owners did not sign, as callers' are."""
    with Peer(synapse.url, make_account(), strict=False) as peer:
        yield peer


@pytest.fixture
def secret() -> str:
    return Fernet.generate_key().decode()


@pytest.fixture
async def device(synapse: LocalSynapse, bot: Account, tmp_path: Path, secret: str) -> AsyncIterator[Bot]:
    """The bot's device, held."""
    async with Bot(synapse, bot, sqlite(tmp_path), secret).running() as device:
        yield device
