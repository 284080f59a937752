"""How functions are compiled that only ever become part of a kernel.

Numba optimises every function by itself and makes machine code of it, then once more in each function that it is
inlined into: the innermost loops of a kernel went through LLVM three or four times. These go through it once, as
part of the kernel; compiling a convolution by Winograd's algorithm takes a third of the time. What several kernels
of a process have in common (transforms, borders, sums) goes through Numba once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.environment import Environment
from numba.core.errors import NumbaError
from numba.core.registry import CPUDispatcher

# What the compiler may assume. Not that numbers are finite: what is not must stay so, to be detected. No estimates of
# quotients and roots, which vectors have but single elements do not, and no other order of sums: then an element has
# the same bits in a vector, in a loop's remainder, in place, and wherever its buffers lie.
OPTIONS: dict[str, Any] = {"fastmath": {"nsz", "contract"}, "error_model": "numpy", "boundscheck": False}


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """LLVM code as Numba wrote it, to be linked into kernels: not optimised, not loaded, never called by itself."""

    def _optimize_functions(self, ll_module: Any) -> None:
        pass

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    @property
    def codegen(self) -> Any:
        return _Nowhere

    def get_pointer_to_function(self, name: str) -> int:
        return 0


class _Nowhere:
    """Where functions are that are never called by themselves: they need no environment. It is forgotten, or Numba
    would keep it with every kernel that they are linked into, and look for the module that had them first."""

    @staticmethod
    def set_env(env_name: str, env: Any) -> None:
        Environment._memo.pop(env_name, None)


class Inlined(Compiler):  # type: ignore[misc]
    """The ``pipeline_class`` of a function with ``forceinline`` and without wrappers."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *rest: Any) -> None:
        super().__init__(typingctx, targetctx, library or _Part(targetctx.codegen(), "part"), *rest)


class _Function(CPUDispatcher):  # type: ignore[misc]
    """Compiles for whole numbers, not once for each constant that it is called with: LLVM sees constants anyhow."""

    def get_call_template(self, args: Any, kws: Any) -> Any:
        try:
            return super().get_call_template(
                [types.unliteral(a) for a in args], {name: types.unliteral(a) for name, a in kws.items()}
            )
        except NumbaError:  # it needs a constant to be one, or is wrong
            return super().get_call_template(args, kws)


_parts: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def part(function: Callable[..., Any]) -> Any:
    """Decorates a function of a kernel: compiled when it is called, or what another kernel has that means the same."""
    key = _meaning(function)
    with _lock:
        if key not in _parts:
            how = {"nopython": True, "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
            _parts[key] = _Function(function, targetoptions={**OPTIONS, **how}, pipeline_class=Inlined)
        return _parts[key]


def _meaning(function: Any) -> tuple[Any, ...]:
    """Functions of equal meanings have the same code, and what their names stand for is the same."""
    code, space = function.__code__, function.__globals__
    names = tuple((name, _value(space[name])) if name in space else name for name in code.co_names)
    counts = (code.co_argcount, code.co_nlocals, code.co_flags, code.co_exceptiontable)
    return (code.co_code, tuple(map(_value, code.co_consts)), names, *counts, repr(function.__defaults__))


def _value(value: Any) -> Any:
    """What a constant is known by: its type and text, since 1, 1.0 and True are equal; others are only themselves."""
    if isinstance(value, bool | int | float | str | tuple | type(None) | np.generic):
        return type(value), repr(value)
    return value if callable(value) else id(value)
