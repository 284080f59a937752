"""Spaces in files: JSON with parameters, lists of values, and constraints as expressions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SpaceError
from .space import Space


def read_spaces(path: Path) -> dict[str, Space]:
    """The spaces of a file by name: ``{name: {"parameters": {name: [...]}, "constraints": ["..."]}}``, or one alone.

    ``"soft"`` may list more constraints, ``"derived"`` name expressions. Raises SpaceError for what cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpaceError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise SpaceError(f"{path} is not JSON: {error}.") from None
    if isinstance(found, dict) and isinstance(found.get("parameters"), dict):
        found = {path.stem: found}
    if not isinstance(found, dict) or not found:
        raise SpaceError(f'{path} has no spaces; write {{"name": {{"parameters": {{...}}, "constraints": [...]}}}}.')
    return {name: _space(f"{path}: {name}", form) for name, form in found.items()}


def _space(owner: str, form: Any) -> Space:
    if not isinstance(form, Mapping) or not isinstance(form.get("parameters"), Mapping):
        raise SpaceError(f'{owner} has no "parameters" with lists of values.')
    for key in ("constraints", "soft"):
        if not _texts(form.get(key, [])):
            raise SpaceError(f"{owner}: {key!r} is {form[key]!r}, not a list of expressions.")
    try:
        return Space(
            form["parameters"],
            derived=form.get("derived", {}),
            hard=form.get("constraints", []),
            soft=form.get("soft", []),
        )
    except SpaceError as error:
        raise SpaceError(f"{owner}: {error}") from None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
