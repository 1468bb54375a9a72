"""Who may call a hook. An unknown hook and a wrong secret get one answer, in the same time, and count as guesses."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """The hook that a request is for, if there is one. `is_admitted`: its sender is known already, by a bare token.

    `at`: when it was looked up (monotonic).
    """

    known: Known | None
    is_admitted: bool
    at: float


class Admission:
    """`aside`: does work in a thread, in the caller's turn."""

    def __init__(self, registry: Registry, refusals: Refusals, aside: Aside) -> None:
        self._registry = registry
        self._refusals = refusals
        self._aside = aside

    def at_once(self, name: str, asked: Asked, body: bytes) -> Known | None:
        """The hook, if the request is its sender's, and nothing has to be looked up. Raises Unavailable.

        An unknown hook takes as long as a wrong secret.
        """
        known = self._registry.at_once(name)
        return None if self._why(known, asked, body)() else known

    async def find(self, name: str, asked: Asked) -> Candidate:
        """The hook that is meant, before the body is read; "" as its name: by its token. Raises Unavailable."""
        at = self._registry.clock()
        known = await self._find(name, asked)
        if known is not None and signatures.has_token(known.hook.verification, known.secrets, asked):
            identify(known)
            return Candidate(known, True, at)
        return Candidate(known, False, at)

    async def admit(self, name: str, found: Candidate, asked: Asked, body: bytes) -> Known:
        """The hook, if the request is its sender's.

        Raises Unauthorized, TooMany for an address that guesses, Unavailable.
        """
        known = found.known
        if found.is_admitted and known is not None:
            return known
        why = await self._wrong(known, asked, body)
        if why:  # a secret may be newer than what is known: a command has just made it
            with ours():
                await self._registry.since(found.at)
                again = await self._find(name, asked)
            if again != known:
                known, why = again, await self._wrong(again, asked, body)
        if why or known is None:
            if known is not None:  # what else stands in its place may be a token
                log.note(hook=known.hook.name)
            log.note(why=why)
            raise self._refusal(name, asked)
        identify(known)
        return known

    @staticmethod
    def _why(known: Known | None, asked: Asked, body: bytes) -> Callable[[], str]:
        """Tells why the request is refused; "" for one that is right."""
        verification, secrets = (known.hook.verification, known.secrets) if known else (_NOBODYS, ())
        return partial(signatures.wrong, verification, secrets, asked, body, time.time())

    async def _find(self, name: str, asked: Asked) -> Known | None:
        return await (self._registry.find(name) if name else self._registry.find_by_token(asked.token))

    async def _wrong(self, known: Known | None, asked: Asked, body: bytes) -> str:
        check = self._why(known, asked, body)
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


def identify(known: Known) -> None:
    peer.identified(f"key {known.hook.owner}")
    log.note(key=known.hook.owner)
