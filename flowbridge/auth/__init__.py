"""Who calls, what they may do, and with which token it is sent."""
