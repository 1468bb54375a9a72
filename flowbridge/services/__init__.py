"""The use cases: what a route, or a command, asks for. Nothing here knows HTTP."""
