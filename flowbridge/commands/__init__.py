"""What the commands do that `cli.py` names: each module is one of them, or a few that belong together."""
