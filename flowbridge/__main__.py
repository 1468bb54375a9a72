"""`python -m flowbridge`."""

from flowbridge.cli.main import main

main()
