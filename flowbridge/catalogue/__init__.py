"""The event types that flowbridge knows, from one JSON Schema file each (schemas/)."""

from flowbridge.catalogue.lint import SchemaError
from flowbridge.catalogue.registry import Catalogue, Entry, built_in

__all__ = ["Catalogue", "Entry", "SchemaError", "built_in"]
