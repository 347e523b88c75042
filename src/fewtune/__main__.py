"""`python -m fewtune`: the command line."""

from fewtune.cli import main

main()
