"""Webhooks in: which hooks there are, who may call them, and what becomes of a request (contract §6)."""
