"""Index arithmetic that is written once: a Python function of numbers, for the emulator and for the compiler.

The emulator calls the function on NumPy integers. For the compiler it is called on `Word`s, which write down what is
done to them. As everywhere in kernels, integers have 32 bits, and are divided only where they are not negative.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .pair import Pair, device_type


class Word:
    """A 32-bit integer of the compiled kernel."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _apply(self, name: str, left: Any, right: Any) -> Word:
        from llvmlite import ir

        values = [x.value if isinstance(x, Word) else ir.Constant(ir.IntType(32), int(x)) for x in (left, right)]
        return Word(self.builder, getattr(self.builder, name)(*values))

    def __add__(self, other: Any) -> Word:
        return self._apply("add", self, other)

    def __sub__(self, other: Any) -> Word:
        return self._apply("sub", self, other)

    def __rsub__(self, other: Any) -> Word:
        return self._apply("sub", other, self)

    def __mul__(self, other: Any) -> Word:
        return self._apply("mul", self, other)

    def __floordiv__(self, other: Any) -> Word:
        return self._apply("udiv", self, other)

    def __mod__(self, other: Any) -> Word:
        return self._apply("urem", self, other)

    def __xor__(self, other: Any) -> Word:
        return self._apply("xor", self, other)

    def __and__(self, other: Any) -> Word:
        return self._apply("and_", self, other)

    def __or__(self, other: Any) -> Word:
        return self._apply("or_", self, other)

    def __lshift__(self, other: Any) -> Word:
        return self._apply("shl", self, other)

    def __rlshift__(self, other: Any) -> Word:
        return self._apply("shl", other, self)

    def __rshift__(self, other: Any) -> Word:
        return self._apply("lshr", self, other)

    __radd__, __rmul__ = __add__, __mul__


def indexing(name: str, function: Callable[..., Any]) -> Pair:
    """An intrinsic that computes an index of others, or a word of bits."""
    count = len(inspect.signature(function).parameters)

    def rule(*types: Any) -> Any:
        integer = device_type("int32")

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return function(*(Word(builder, arg) for arg in args)).value

        return integer, (integer,) * count, emit

    rule.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return Pair(name, function, rule)
