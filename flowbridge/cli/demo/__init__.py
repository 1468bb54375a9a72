"""A real homeserver on this machine, and the tour of it that `flowbridge demo` gives."""
