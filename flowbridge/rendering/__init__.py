"""Markdown and HTML, made into what Matrix rooms show; in processes of their own (processes.py)."""
