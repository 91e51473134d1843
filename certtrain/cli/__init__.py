"""The command line."""

from certtrain.cli.main import main

__all__ = ["main"]
