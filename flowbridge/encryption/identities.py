"""Other users' devices, as a homeserver tells of them in /keys/query, and what of that is proved. Pure.

A homeserver can leave devices out, or make some up. It cannot sign them: a device counts when it signed its own keys,
and is `signed` when its owner's self-signing key did, which the owner's master key signed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeGuard

from flowbridge.encryption import signatures
from flowbridge.encryption.olm import CryptoError

OLM = "m.olm.v1.curve25519-aes-sha2"
MEGOLM = "m.megolm.v1.aes-sha2"
ALGORITHMS = [OLM, MEGOLM]
MAX_DEVICES = 2_000  # of one user
MAX_ID = 255  # characters of what Matrix gives a name to


def is_id(value: object) -> TypeGuard[str]:
    """Whether this may be the id of a user, a device or a session, or a key: what fits a database, and no more."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID and value.isprintable()


@dataclass(frozen=True, slots=True)
class Device:
    """`signed`: by its owner's cross-signing keys. `reads`: it can be given room keys."""

    user_id: str
    device_id: str
    curve25519: str
    ed25519: str
    signed: bool = False
    reads: bool = True


@dataclass(frozen=True, slots=True)
class Identity:
    """A user's public cross-signing keys. `self_signing`: "" when the master key did not sign it; so of the other."""

    master: str
    self_signing: str = ""
    user_signing: str = ""


@dataclass(frozen=True, slots=True)
class UserKeys:
    """A user's devices by device id, and its cross-signing identity, where it has one."""

    user_id: str
    devices: Mapping[str, Device]
    identity: Identity | None = None

    def by_key(self, curve25519: str) -> Device | None:
        return next((device for device in self.devices.values() if device.curve25519 == curve25519), None)

    def kept(self) -> dict[str, Any]:
        """As JSON; see `from_kept`."""
        return {
            "devices": [_without_user(device) for device in self.devices.values()],
            "identity": asdict(self.identity) if self.identity else None,
        }

    @classmethod
    def from_kept(cls, user_id: str, kept: Mapping[str, Any]) -> Self:
        devices = [Device(user_id=user_id, **each) for each in kept["devices"]]
        identity = Identity(**kept["identity"]) if kept["identity"] else None
        return cls(user_id, {device.device_id: device for device in devices}, identity)


def _without_user(device: Device) -> dict[str, Any]:
    return {name: value for name, value in asdict(device).items() if name != "user_id"}


def of_answer(answer: Any, user_id: str, before: UserKeys | None = None) -> tuple[UserKeys, list[str]]:
    """What the answer to a key query says of this user; and what is wrong in it, in words.

    A device never changes its keys: with others under the same id it is refused, and stays as it was known `before`.
    """
    wrong: list[str] = []
    identity = _identity(answer, user_id, wrong)
    told = _object(answer, "device_keys", user_id)
    if len(told) > MAX_DEVICES:
        wrong.append(f"{user_id} has {len(told)} devices, of which {MAX_DEVICES} count")
    devices: dict[str, Device] = {}
    by_key: set[str] = set()
    known = before.devices if before else {}
    for device_id, keys in list(told.items())[:MAX_DEVICES]:
        try:
            device = device_of(keys, user_id, device_id)
        except CryptoError as error:
            wrong.append(f"{user_id} {device_id[:MAX_ID]}: {error}")
            continue
        earlier = known.get(device_id)
        if earlier is not None and (earlier.ed25519, earlier.curve25519) != (device.ed25519, device.curve25519):
            wrong.append(f"{user_id} {device_id}: it has other keys than before, which are not taken")
            device, keys = replace(earlier, signed=False), {}
        if device.curve25519 in by_key:
            wrong.append(f"{user_id} {device_id}: another device of the user has the same key")
            continue
        by_key.add(device.curve25519)
        key = identity.self_signing if identity else ""
        devices[device_id] = replace(device, signed=bool(key) and signatures.is_signed(keys, user_id, key, key))
    return UserKeys(user_id, devices, identity), wrong


def device_of(keys: Any, user_id: str, device_id: str) -> Device:
    """A device that signed its keys itself. Raises CryptoError, which says what is wrong."""
    if not isinstance(keys, dict) or (keys.get("user_id"), keys.get("device_id")) != (user_id, device_id):
        raise CryptoError("its keys are not of this user and device")
    named = _object(keys, "keys")
    ed25519, curve25519 = named.get(f"ed25519:{device_id}"), named.get(f"curve25519:{device_id}")
    if not is_id(device_id) or not is_id(ed25519) or not is_id(curve25519):
        raise CryptoError("it names no keys of its own")
    if not signatures.is_signed(keys, user_id, device_id, ed25519):
        raise CryptoError("it did not sign its own keys")
    algorithms = keys.get("algorithms")
    reads = isinstance(algorithms, list) and OLM in algorithms and MEGOLM in algorithms
    return Device(user_id, device_id, curve25519, ed25519, reads=reads)


def _identity(answer: Any, user_id: str, wrong: list[str]) -> Identity | None:
    told = _object(answer, "master_keys", user_id)
    if not told:
        return None
    if (master := _only_key(told, user_id, "master")) is None:
        wrong.append(f"{user_id}: its master key is not one")
        return None
    found = {}
    for usage in ("self_signing", "user_signing"):
        key = _object(answer, f"{usage}_keys", user_id)
        if not key:
            continue
        public = _only_key(key, user_id, usage)
        if public is None or not signatures.is_signed(key, user_id, master, master):
            wrong.append(f"{user_id}: its {usage} key is not signed by its master key")
            continue
        found[usage] = public
    return Identity(master, **found)


def _only_key(value: Mapping[str, Any], user_id: str, usage: str) -> str | None:
    keys, usages = _object(value, "keys"), value.get("usage")
    if value.get("user_id") != user_id or not isinstance(usages, list) or usage not in usages or len(keys) != 1:
        return None
    ((name, public),) = keys.items()
    return public if isinstance(public, str) and name == f"ed25519:{public}" else None


def _object(value: Any, *names: str) -> dict[str, Any]:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
