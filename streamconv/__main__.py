"""`python -m streamconv`."""

from streamconv.cli.main import run

run()
