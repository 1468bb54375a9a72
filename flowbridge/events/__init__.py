"""The event types that flowbridge knows, from one JSON Schema file each (schemas/)."""

from flowbridge.events.catalogue import Catalogue, Entry, built_in
from flowbridge.events.schema_lint import SchemaError

__all__ = ["Catalogue", "Entry", "SchemaError", "built_in"]
