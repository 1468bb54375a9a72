"""flowbridge: one HTTP call puts an event into a Matrix room."""

from importlib.metadata import version

__version__ = version("flowbridge")
