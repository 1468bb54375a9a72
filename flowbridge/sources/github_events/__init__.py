"""What GitHub reports, by the kind of event. Gitea and Forgejo have most of its shapes (`gitea.py`)."""
