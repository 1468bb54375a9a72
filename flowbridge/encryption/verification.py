"""Interactive verifications of the bridge's device: which are taken, and what follows from one that went well.

A request of a user that nobody has named gets no answer: another device of the account may be meant. After a
verification the other user's master key is signed with the account's user-signing key, which its clients see; another
device of the account itself is signed with the self-signing key.
"""

import time
from collections.abc import Callable, Sequence

from flowbridge import log
from flowbridge.encryption import complaints, sas, signatures
from flowbridge.encryption.identities import MAX_ID, device_of, is_id
from flowbridge.encryption.key_server import KeyServer
from flowbridge.encryption.olm import CryptoError
from flowbridge.encryption.own_device import OwnDevice
from flowbridge.encryption.peers import Peers
from flowbridge.encryption.sas import PREFIX, Party, Step, Verification
from flowbridge.errors import MatrixError
from flowbridge.homeserver.sync import Json, section
from flowbridge.limits.cache import Cache
from flowbridge.store import clock

MAX_VERIFICATIONS = 50  # remembered; each begins with a question to the homeserver
MAX_WAITING = 200  # steps of one sync
EARLY_MS, LATE_MS = 300_000, 600_000  # a request counts from five minutes ahead to ten minutes ago

Said = tuple[str, str, Json]  # the sender, a type without its prefix, and a content
Compare = Callable[[Verification], object]


class Verifications:
    """`users`: whose requests are taken. `compare`: called with a verification whose emoji are to be compared; without
    it they count as matching, so that the homeserver is believed which keys these users have.
    """

    def __init__(self, device: OwnDevice, server: KeyServer, peers: Peers) -> None:
        self._device = device
        self._server = server
        self._peers = peers
        self.users: frozenset[str] = frozenset()
        self.compare: Compare | None = None
        self.last: Verification | None = None  # that was begun
        self._known: Cache[tuple[str, str], Verification] = Cache(MAX_VERIFICATIONS, sas.LASTS_SECONDS)
        self._waiting: list[Said] = []

    def take(self, events: Sequence[Json]) -> None:
        """To-device events of a sync; `handle` does the rest, without the device's lock."""
        for event in events:
            type_, sender, content = event.get("type"), event.get("sender"), section(event, "content")
            if not isinstance(type_, str) or not type_.startswith(PREFIX) or not is_id(sender):
                continue
            if sender not in self.users:
                if type_ == f"{PREFIX}request":
                    hint = f"`flowbridge device verify {sender}` takes the next, FLOWBRIDGE_VERIFY_USERS all of a user"
                    complaints.warn("verification_not_taken", sender=sender, hint=hint)
            elif len(self._waiting) < MAX_WAITING:
                self._waiting.append((sender, type_.removeprefix(PREFIX), content))

    async def handle(self) -> None:
        """Go on with what has come, and end what has taken too long. A homeserver that fails ends a verification."""
        waiting, self._waiting = self._waiting, []
        for sender, kind, content in waiting:
            try:
                await self._step(sender, kind, content)
            except (MatrixError, CryptoError) as error:
                log.warning("verification_failed", sender=sender, reason=error)
        for verification in [each for _, each in self._known.items()]:
            try:
                await self._tell(verification, verification.expire())
            except MatrixError as error:  # the other side has a clock, too
                log.warning("verification_failed", sender=verification.theirs.user_id, reason=error)

    async def confirm(self, verification: Verification, *, matches: bool) -> None:
        """What a person says of the emoji. Raises MatrixError, CryptoError."""
        await self._tell(verification, verification.confirm(matches=matches))

    async def cancel(self, verification: Verification) -> None:
        if not verification.is_over:
            await self._tell(verification, [verification.cancel("m.user")])

    async def _step(self, sender: str, kind: str, content: Json) -> None:
        transaction = content.get("transaction_id")
        if not is_id(transaction):
            return
        verification = self._known.get((sender, transaction))
        if kind == "request":
            if verification is None:
                await self._begin(sender, transaction, content)
            return
        if verification is None:
            device = content.get("from_device")
            if kind == "start" and is_id(device):  # the others name no device that could be told
                code = "m.unknown_transaction"
                body = {"code": code, "reason": sas.REASONS[code], "transaction_id": transaction}
                await self._server.send_to_device(f"{PREFIX}cancel", {sender: {device: body}})
            return
        was_shown = bool(verification.shown)
        await self._tell(verification, verification.take(kind, content))
        if verification.shown and not was_shown:
            if self.compare is None:
                await self.confirm(verification, matches=True)
            else:
                self.compare(verification)

    async def _begin(self, sender: str, transaction: str, content: Json) -> None:
        device_id, methods, told_at = (content.get(name) for name in ("from_device", "methods", "timestamp"))
        now = clock.now_ms()
        if not is_id(device_id) or not isinstance(methods, list) or type(told_at) is not int:
            complaints.warn("verification_not_taken", sender=sender, reason="its request is malformed")
            return
        if (sender, device_id) == (self._device.user_id, self._device.device_id):
            return
        if not now - LATE_MS < told_at < now + EARLY_MS:
            complaints.warn("verification_not_taken", sender=sender, reason="its request is of another time")
            return
        theirs = await self._party(sender, device_id)
        if theirs is None:
            complaints.warn("verification_not_taken", sender=sender, reason="the homeserver lists no such device")
            return
        for (user, _), other in self._known.items():  # one at a time: a newer request takes the older one's place
            if user == sender:
                await self.cancel(other)
        verification = Verification(self._mine(), theirs, transaction)
        verification.ends_at = time.monotonic() + min(sas.LASTS_SECONDS, (told_at + LATE_MS - now) / 1000)
        self._known.put((sender, transaction), verification)
        self.last = verification
        log.info("verification_begun", sender=sender, device=device_id)
        can = sas.METHOD in methods
        await self._tell(verification, [verification.ready() if can else verification.cancel("m.unknown_method")])

    def _mine(self) -> Party:
        own = self._device
        keys = {f"ed25519:{own.device_id}": own.account.ed25519}
        cross_signing = own.cross_signing
        if cross_signing is not None and "master" in cross_signing.keys:
            master = cross_signing.keys["master"].public
            keys[f"ed25519:{master}"] = master
        return Party(own.user_id, own.device_id, keys)

    async def _party(self, user_id: str, device_id: str) -> Party | None:
        """A device and its user's master key, as the homeserver lists them now."""
        self._peers.mark([user_id])
        user = (await self._peers.of([user_id])).get(user_id)
        device = user.devices.get(device_id) if user else None
        if user is None or device is None:
            return None
        if user.identity is not None and user.identity.master == device_id:
            return None  # a key id would mean two keys: CVE-2022-39250
        keys = {f"ed25519:{device_id}": device.ed25519}
        if user.identity is not None:
            keys[f"ed25519:{user.identity.master}"] = user.identity.master
        return Party(user_id, device_id, keys)

    async def _tell(self, verification: Verification, steps: Sequence[Step]) -> None:
        """Send what the other device is to be told; before "done", sign what it proved."""
        theirs = verification.theirs
        for kind, content in steps:
            if kind == "done":
                await self._sign(verification)
            body = {**content, "transaction_id": verification.transaction}
            await self._server.send_to_device(f"{PREFIX}{kind}", {theirs.user_id: {theirs.device_id: body}})
            if kind == "done":
                log.info("verified", user=theirs.user_id, device=theirs.device_id)
            elif kind == "cancel":
                log.warning("verification_cancelled", sender=theirs.user_id, reason=verification.trouble[:MAX_ID])

    async def _sign(self, verification: Verification) -> None:
        own, theirs = self._device, verification.theirs
        cross_signing = own.cross_signing
        if cross_signing is None:
            return
        if theirs.user_id == own.user_id:
            await self._sign_own(theirs)
            return
        device_key = f"ed25519:{theirs.device_id}"
        masters = [key for name, key in theirs.keys.items() if name != device_key and name in verification.trusted]
        signer = cross_signing.keys.get("user_signing")
        for master in masters if signer else []:
            assert signer is not None
            value: Json = {"user_id": theirs.user_id, "usage": ["master"], "keys": {f"ed25519:{master}": master}}
            signature = signer.sign(signatures.signed_part(value))
            signed = signatures.add(value, own.user_id, signer.public, signature)
            await self._upload({theirs.user_id: {master: signed}})

    async def _sign_own(self, theirs: Party) -> None:
        """Another device of the account, whose keys are those that were proved."""
        own = self._device
        cross_signing = own.cross_signing
        if cross_signing is None or "self_signing" not in cross_signing.keys:
            return
        keys = section(await self._server.query([own.user_id]), "device_keys", own.user_id, theirs.device_id)
        listed = device_of(keys, own.user_id, theirs.device_id)
        if listed.ed25519 != theirs.keys[f"ed25519:{theirs.device_id}"]:
            raise CryptoError("the homeserver lists other keys of the device than it did")
        bare = {name: value for name, value in keys.items() if name not in ("signatures", "unsigned")}
        await self._upload({own.user_id: {theirs.device_id: cross_signing.sign_device(bare)}})

    async def _upload(self, signed: Json) -> None:
        failures = await self._server.upload_signatures(signed)
        if failures:
            raise CryptoError("the homeserver does not take the signature of what was verified")
