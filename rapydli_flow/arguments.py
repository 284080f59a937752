"""What arguments are: numbers or not; and misspelt ones, an error that names the function, what was given, and the
nearest name that there is."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral
from types import FunctionType
from typing import Any, TypeGuard, TypeVar

from .errors import ArgumentError, SettingError

F = TypeVar("F", bound=Callable[..., Any])


def is_number(value: object) -> TypeGuard[int | float]:
    """An int or a float; True and False are none, though Python counts with them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """An int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(where: str, least: int = 1, **values: object) -> None:
    """SettingError for what is no whole number, or less than ``least``; None is not looked at."""
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are whole numbers, too
            raise SettingError(f"{where}: {name}={value!r} is not a whole number.")
        if value < least:
            raise SettingError(f"{where}: {name}={value} is not {least} or more.")


def check_seconds(where: str, least: str = "0 or more", **values: object) -> None:
    """SettingError for what is no finite number of seconds of 0 or more; ``least`` says so."""
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < float("inf"):
            raise SettingError(f"{where}: {name}={value!r} is not {least} seconds.")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Nearest: 'stride'.``, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Nearest: {', '.join(map(repr, near))}." if near else ""


def spelled(function: F, name: str | None = None) -> F:
    """The function; keywords that it does not have are an ArgumentError with the nearest that it has."""
    parameters = inspect.signature(function).parameters
    known = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    title = name or function.__name__
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for given in kwargs:
            if given not in known:
                raise ArgumentError(
                    f"{title}: there is no argument {given!r}.{nearest(given, known)} Its arguments are "
                    f"{', '.join(known)}."
                )
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def spell_check(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Let every function of a package's public ``names`` be `spelled`."""
    for name in names:
        if isinstance(namespace[name], FunctionType):
            namespace[name] = spelled(namespace[name], name)
