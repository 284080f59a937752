"""The command line: `rapydli train`, `rapydli show`, `rapydli tune`. Uses the API and prints; nothing imports it."""

from .main import main

__all__ = ["main"]
