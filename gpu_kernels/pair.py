"""Pair: an intrinsic with two halves, one for the compiler and one for the emulator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rapydli_flow.spec import HALVES


@dataclass(frozen=True, eq=False)
class Pair:
    """One intrinsic: its NumPy twin, and the rule from which numba-cuda's half is made.

    ``rule(*types)`` returns the result type, the parameter types, and a function that emits LLVM IR.
    """

    name: str
    twin: Callable[..., Any]
    rule: Callable[..., tuple[Any, Sequence[Any], Callable[..., Any]]]

    def __call__(self, *args: Any) -> Any:
        return self.twin(*args)

    @cached_property
    def device(self) -> Any:
        """The intrinsic of numba-cuda."""
        from numba.cuda.extending import intrinsic
        from numba.cuda.typing import signature

        def definition(typing: Any, *types: Any) -> Any:
            result, parameters, emit = self.rule(*types)
            return signature(result, *parameters), emit

        # Numba asks the signature how many arguments there are
        first = inspect.Parameter("typing", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        rest = inspect.signature(self.rule).parameters.values()
        definition.__signature__ = inspect.Signature([first, *rest])  # type: ignore[attr-defined]
        definition.__name__ = self.name
        return intrinsic(definition)


def held(dtype: str) -> str:
    """The dtype of an element in a register: halves are float32 there."""
    return "float32" if dtype in HALVES else dtype


def device_type(dtype: str) -> Any:
    """Numba's type of an element in a register."""
    from numba.cuda import types

    return getattr(types, held(dtype))


def stored_type(dtype: str) -> Any:
    """Numba's type of an element in memory."""
    from numba.cuda import types

    return types.uint16 if dtype in HALVES else getattr(types, dtype)
