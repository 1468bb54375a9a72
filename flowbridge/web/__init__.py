"""HTTP in: the server process and its protocol, routing on the raw path, what all answers have in common."""
