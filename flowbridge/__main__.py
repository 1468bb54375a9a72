"""`python -m flowbridge`."""

from flowbridge.cli import main

main()
