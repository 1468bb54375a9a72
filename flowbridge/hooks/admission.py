"""Who may call a hook. An unknown hook and a wrong secret get one answer, in the same time, and count as guesses."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from functools import partial

from flowbridge import log
from flowbridge.auth.refusals import Refusals
from flowbridge.errors import MatrixError, Unauthorized
from flowbridge.hooks import signatures
from flowbridge.hooks.known import Known
from flowbridge.hooks.registry import Registry
from flowbridge.hooks.signatures import Asked
from flowbridge.hooks.trouble import ours
from flowbridge.limits import peer
from flowbridge.models.hooks import Verification

LARGE_BYTES = 64 * 1024  # a larger body is hashed in a thread

Aside = Callable[..., Awaitable[str]]
_REFUSED = "there is no such hook, or its secret or signature is wrong"
_NOBODYS = Verification()


class Admission:
    """`aside`: does work in a thread, in the caller's turn."""

    def __init__(self, registry: Registry, refusals: Refusals, aside: Aside) -> None:
        self._registry = registry
        self._refusals = refusals
        self._aside = aside

    async def find(self, name: str, asked: Asked) -> tuple[Known | None, bool]:
        """The hook that is meant; "" as its name: the one that the token belongs to. Raises Unavailable.

        And whether its sender is identified already, by a bare token, before the body is read.
        """
        known = await (self._registry.find(name) if name else self._registry.find_by_token(asked.token))
        if known is not None and signatures.has_token(known.hook.verification, known.secrets, asked):
            _identify(known)
            return known, True
        return known, False

    async def admit(self, name: str, known: Known | None, asked: Asked, body: bytes) -> Known:
        """The hook, if by its body the request is its sender's.

        Raises Unauthorized, TooMany for an address that guesses.
        """
        why = await self._wrong(known, asked, body)
        if why:  # a secret may be newer than what is known
            again = await (self._registry.find(name, again=True) if name else self._registry.find_by_token(asked.token))
            if again != known:
                known, why = again, await self._wrong(again, asked, body)
        if why or known is None:
            if known is not None:  # what else stands in its place may be a token
                log.note(hook=known.hook.name)
            log.note(why=why)
            raise self._refusal(name, asked)
        _identify(known)
        return known

    async def _wrong(self, known: Known | None, asked: Asked, body: bytes) -> str:
        verification, secrets = (known.hook.verification, known.secrets) if known else (_NOBODYS, ())
        check = partial(signatures.wrong, verification, secrets, asked, body, time.time())
        if len(body) < LARGE_BYTES:
            return check()
        with ours():
            return await self._aside(check)

    def _refusal(self, name: str, asked: Asked) -> MatrixError:
        # The same token again is no new guess. Signatures cannot be guessed: a sender with a wrong secret makes
        # another one of each body, and must not use up what its address has for others.
        digest = hashlib.sha256(f"hook {name} {asked.token} {asked.headers.get('authorization', '')}".encode()).digest()
        address = peer.address()
        self._refusals.check(address, digest)
        refusal = Unauthorized(_REFUSED)
        self._refusals.note(address, digest, refusal)
        return refusal


def _identify(known: Known) -> None:
    peer.identified(f"key {known.hook.owner}")
    log.note(key=known.hook.owner)
