"""How a command fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..errors import RapydliError


@contextmanager
def plain_errors() -> Iterator[None]:
    """One line for an error that rapydli_flow raised on purpose; anything else is a bug and keeps its traceback."""
    try:
        yield
    except RapydliError as error:
        raise click.ClickException(str(error)) from error
