"""`python -m dispersive_kit` is `dispersive-kit`, also where scripts are not on the path."""

from dispersive_kit.cli import main

main()
