"""flowbridge: one HTTP call puts an event into a Matrix room."""

__version__ = "0.1.0"
