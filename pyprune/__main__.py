"""``python -m pyprune``: the command line where no script is installed."""

from pyprune.cli import main

main()
