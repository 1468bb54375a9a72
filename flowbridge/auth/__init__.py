"""Who the caller is, what it may do, and with which token its events are sent."""
