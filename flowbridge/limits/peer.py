"""The caller whose request is being served: the name under which its share of a bound is counted.

It is an API key, a Matrix user or, before authentication, the client's address. It travels with the request's task, so
that a bound deep inside (connections to the homeserver, parsing of large answers) needs no further argument. Work that
no request asked for has no name, and no share.
"""

from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from flowbridge.limits.proxies import network_of

P = ParamSpec("P")
T = TypeVar("T")

_address: ContextVar[str] = ContextVar("address", default="")
_who: ContextVar[str] = ContextVar("who", default="")
_spent: ContextVar[list[float] | None] = ContextVar("spent", default=None)  # one number, for its tasks, too


def enter(scope: MutableMapping[str, Any]) -> None:
    """A request begins."""
    client = scope.get("client")
    found = network_of(client[0]) if client else "unknown"
    _address.set(found)
    _who.set(found)
    _spent.set([0.0])


def identified(name: str) -> None:
    """The request belongs to this user, or to this API key."""
    if _who.get():
        _who.set(name)


def who() -> str:
    """The API key, the user or the address; "" for the bridge's own work."""
    return _who.get()


def is_guest() -> bool:
    """Whether the request's caller has not been authenticated so far."""
    found = _address.get()
    return bool(found) and found == _who.get()


def address() -> str:
    """Where the request comes from; "" for the bridge's own work."""
    return _address.get()


def spend(seconds: float) -> None:
    """Add processor seconds that the request has used outside the event loop."""
    if (found := _spent.get()) is not None:
        found[0] += seconds


def spent() -> float:
    """The processor seconds that the request has used outside the event loop so far."""
    found = _spent.get()
    return found[0] if found is not None else 0.0


def own_work(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Work that serves every caller, whichever needs it first: it counts in no caller's share."""

    @wraps(function)
    async def work(*args: P.args, **kwargs: P.kwargs) -> T:
        address, who = _address.get(), _who.get()
        _address.set("")
        _who.set("")
        try:
            return await function(*args, **kwargs)
        finally:  # not by a token: a task that never ends is closed in another context
            _address.set(address)
            _who.set(who)

    return work
