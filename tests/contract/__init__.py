"""What openapi.json promises, held against the running bridge."""
