"""Matrix out: where the homeserver is, how it is called, and what its answers mean."""

from flowbridge.homeserver.address import AddressUnknown, Locator, tls_context
from flowbridge.homeserver.base_url import Address, AddressError
from flowbridge.homeserver.client import Homeserver
from flowbridge.homeserver.relay import Relay

__all__ = ["Address", "AddressError", "AddressUnknown", "Homeserver", "Locator", "Relay", "tls_context"]
