"""Making a device of the bridge, and making it the account's own: cross-signing, secret storage, recovery.

Nothing here replaces an identity that the account has already, unless it is asked to by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowbridge import log
from flowbridge.encryption import secret_storage
from flowbridge.encryption.cross_signing import USAGES, CrossSigning, secret_name
from flowbridge.encryption.identities import UserKeys, of_answer
from flowbridge.encryption.key_server import KeyServer
from flowbridge.encryption.olm import Account, CryptoError
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.sealing import Seal
from flowbridge.homeserver.sync import Json, section
from flowbridge.store import Database
from flowbridge.store.crypto import Changes, DeviceLease, StoredDevice

BACKUP_SECRET = "m.megolm_backup.v1"  # noqa: S105 - the name of a secret, which anyone knows

OF_THE_ACCOUNT = (
    "cross_signing",
    "backup_key",
)  # among a device's secrets: another device of the account has them, too

Standing = Literal["signed", "unsigned", "foreign", "absent"]
ShowKey = Callable[[str], None]

HINTS: Mapping[Standing, str] = {
    "signed": "",
    "unsigned": "`flowbridge device setup` makes the account's cross-signing keys",
    "foreign": "the account is cross-signed by another client: `flowbridge device recover` takes its recovery key",
    "absent": "the homeserver does not have the device's keys",
}


class DeviceTaken(CryptoError):
    """The device has another client's keys: its token is not for the bridge to encrypt with."""


@dataclass(frozen=True, slots=True)
class Report:
    """How the device stands. signed: others may rely on it. unsigned: the account has no cross-signing keys yet.

    foreign: it has some, and not the bridge. absent: the homeserver does not have the device's keys, or other ones.
    """

    standing: Standing
    user_id: str
    device_id: str
    fingerprint: str  # the device's Ed25519 key
    master: str = ""
    has_storage: bool = False


def new_device(seal: Seal, user_id: str, device_id: str, before: StoredDevice | None = None) -> StoredDevice:
    """Keys for a device that has none yet. It has the account's secrets of the one `before` it."""
    secrets = seal.open(before.sealed) if before is not None else {}
    mine = {name: value for name, value in secrets.items() if name in OF_THE_ACCOUNT}
    return StoredDevice(user_id, device_id, Account().pickle(seal.pickle_key), seal.close(mine), None)


async def own_keys(server: KeyServer, user_id: str) -> UserKeys:
    """What the homeserver tells others of the account. Raises MatrixError."""
    keys, wrong = of_answer(await server.query([user_id]), user_id)
    for fault in wrong:
        log.warning("keys_not_taken", reason=fault)
    return keys


async def require_free(server: KeyServer, user_id: str, device_id: str) -> None:
    """Raise DeviceTaken when a client has given the device keys: two that used it would make it unreadable to all."""
    if device_id in (await own_keys(server, user_id)).devices:
        raise DeviceTaken(
            f"the token's device {device_id} has the keys of another client: give the bridge a token of its own, from "
            "a login that no other client uses"
        )


async def report(device: OwnDevice, server: KeyServer) -> Report:
    """How the device stands, as others see it. Raises MatrixError."""
    user = await own_keys(server, device.user_id)
    published = user.devices.get(device.device_id)
    standing: Standing
    if published is None or published.ed25519 != device.account.ed25519:
        standing = "absent"
    elif published.signed:
        standing = "signed"
    else:
        standing = "foreign" if user.identity is not None else "unsigned"
    storage = await server.account_data(device.user_id, secret_storage.DEFAULT_KEY)
    master = user.identity.master if user.identity else ""
    return Report(
        standing, device.user_id, device.device_id, device.account.ed25519, master, isinstance(storage.get("key"), str)
    )


async def report_of(stored: StoredDevice, database: Database, seal: Seal, server: KeyServer) -> Report:
    """As `report`, for a device that another process may be acting as. Raises CryptoError, MatrixError."""
    nobody = DeviceLease("", "", 0)
    return await report(OwnDevice(database, seal, nobody, stored), server)


async def cross_sign(
    device: OwnDevice, server: KeyServer, *, show: ShowKey, password: str = "", reset: bool = False
) -> None:
    """Make the account's cross-signing keys, sign the device, and put the keys into secret storage.

    `show`: is given the recovery key before it is used. Where there is secret storage already it is left alone, and the
    keys are in the bridge's store only. They are kept before they are published: after a crash this goes on with them.

    Raises CryptoError where the account has an identity that is not ours, unless `reset`; ProofNeeded where
    `password` does not prove enough.
    """
    user = await own_keys(server, device.user_id)
    keys = device.cross_signing
    if keys is not None and set(keys.keys) != set(USAGES):
        keys = None
    if user.identity is not None and not (keys is not None and keys.matches(user.identity)) and not reset:
        raise CryptoError(
            "the account has cross-signing keys of another client: `flowbridge device recover` asks for its recovery "
            "key, `flowbridge device setup --reset` replaces them"
        )
    if keys is None or (reset and not keys.matches(user.identity)):
        keys = CrossSigning.generate(device.user_id)
        await _keep(device, {"cross_signing": keys.seeds()})
    if user.identity is None or reset:
        await server.publish_cross_signing(keys.upload(device.device_id, device.account.sign), password)
    await sign_device(device, server)
    await _store(device, server, keys, show, reset=reset)


async def sign_device(device: OwnDevice, server: KeyServer) -> None:
    """Publish the signature of the account's self-signing key. Raises CryptoError when the homeserver refuses it."""
    keys = device.keys()
    failures = await server.upload_signatures({device.user_id: {device.device_id: keys}})
    if failures:
        raise CryptoError(f"the homeserver does not take the device's signature: {_first(failures)}")
    log.info("device_signed", user=device.user_id, device=device.device_id)


async def recover(device: OwnDevice, server: KeyServer, given: str) -> list[str]:
    """Take the account's secrets out of secret storage, by its recovery key or passphrase, and sign the device.

    Returns their names. Raises CryptoError when it does not fit, or the self-signing key is not there; MatrixError.
    """
    key_id = (await server.account_data(device.user_id, secret_storage.DEFAULT_KEY)).get("key")
    if not isinstance(key_id, str):
        raise CryptoError("the account has no secret storage: no recovery key was ever made for it")
    description = await server.account_data(device.user_id, secret_storage.key_type(key_id))
    key = _key_of(given, description)
    seeds: dict[str, str] = {}
    for usage in USAGES:
        name = secret_name(usage)
        sealed = section(await server.account_data(device.user_id, name), "encrypted").get(key_id)
        if sealed is not None:
            seeds[usage] = secret_storage.decrypt(key, name, sealed)
    if "self_signing" not in seeds:
        raise CryptoError("the account's self-signing key is not in its secret storage")
    keys = CrossSigning.from_seeds(device.user_id, seeds)
    if not keys.matches((await own_keys(server, device.user_id)).identity):
        raise CryptoError("the cross-signing keys in secret storage are not those that the account has published")
    found: dict[str, Any] = {"cross_signing": keys.seeds()}
    sealed = section(await server.account_data(device.user_id, BACKUP_SECRET), "encrypted").get(key_id)
    if sealed is not None:
        found["backup_key"] = secret_storage.decrypt(key, BACKUP_SECRET, sealed)
    await _keep(device, found)
    await sign_device(device, server)
    return sorted([*map(secret_name, seeds), *([BACKUP_SECRET] if "backup_key" in found else [])])


def _key_of(given: str, description: Json) -> bytes:
    """The key that a person means: a recovery key, or else a passphrase. Raises CryptoError when it does not fit."""
    try:
        key = secret_storage.read_recovery_key(given)
    except CryptoError:
        if "passphrase" not in description:
            raise
        key = secret_storage.key_of_passphrase(given, description)
    if not secret_storage.fits(key, description):
        raise CryptoError("it is not the key of this account's secret storage")
    return key


async def _store(device: OwnDevice, server: KeyServer, keys: CrossSigning, show: ShowKey, *, reset: bool) -> None:
    """Put the keys into secret storage under a new recovery key. That it is the default key is written last."""
    user_id = device.user_id
    there = (await server.account_data(user_id, secret_storage.DEFAULT_KEY)).get("key")
    if isinstance(there, str) and not reset:
        return
    key, key_id = secret_storage.new_key(), secret_storage.new_key().hex()
    show(secret_storage.recovery_key(key))
    await server.set_account_data(user_id, secret_storage.key_type(key_id), secret_storage.describe(key))
    for usage, seed in keys.seeds().items():
        name = secret_name(usage)
        content = {"encrypted": {key_id: secret_storage.encrypt(key, name, seed)}}
        await server.set_account_data(user_id, name, content)
    await server.set_account_data(user_id, secret_storage.DEFAULT_KEY, {"key": key_id})


async def _keep(device: OwnDevice, secrets: Mapping[str, Any]) -> None:
    async with device.lock:
        device.secrets.update(secrets)
        changes = Changes()
        device.note_secrets(changes)
        await device.commit(changes)


def _first(failures: Any) -> str:
    while isinstance(failures, dict) and failures:
        if isinstance(failures.get("error"), str):
            return str(failures["error"])
        failures = next(iter(failures.values()))
    return "it does not say why"
