"""`python -m moeserve`: the command line, with the working folder on the import path."""

from moeserve.cli.app import entry

entry()
