"""Matrix out: where the homeserver is, how it is called, and what its answers mean."""

from flowbridge.homeserver.address import Address, AddressError, AddressUnknown, Locator, tls_context
from flowbridge.homeserver.client import Homeserver
from flowbridge.homeserver.relay import Relay

__all__ = ["Address", "AddressError", "AddressUnknown", "Homeserver", "Locator", "Relay", "tls_context"]
