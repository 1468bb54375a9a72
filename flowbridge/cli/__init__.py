"""What the commands do that `main.py` names: each module is one of them, or a few that belong together."""
