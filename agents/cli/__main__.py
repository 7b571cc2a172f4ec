"""`python -m agents.cli`."""

from agents.cli.main import main

main()
