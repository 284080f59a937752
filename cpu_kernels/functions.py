"""Elementary functions of kernels: what `math` is there.

A float32 gets the functions below, any other number those of `math`. Those are calls of the C library, one for each
element; these are branch-free arithmetic on a number and its bits, which LLVM vectorises with the loop around it. A
vector library (Intel's is closed, others are one more thing to install) would leave a loop's remainder to the C
library: an element would have other bits in a vector than alone. Here both are the same instructions. They have no
fast-math flags, so that zeros keep their signs; LLVM may fuse a product with its sum, in both alike.

Method: Cephes by S. Moshier, unless a function says otherwise. The argument is reduced (Cody and Waite, "Software
Manual for the Elementary Functions", 1980), a polynomial approximates what is left, exponents are put in as bits.
Errors are the largest of all float32 that a function is not constant or the identity on (every third for `log`), in
units in the last place (ulp), against float64, where multiply-adds are fused. Where they are not, the largest of random
ones were 1.61 for `expm1` and 2.68 for `erf`, else the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import *  # noqa: F403  what is not below is that of `math`
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

INT, FLOAT = ir.IntType(32), ir.FloatType()
WRITTEN = ("exp", "expm1", "log", "log1p", "tanh", "erf")  # what is below; it takes several times as long alone
INFINITY, NAN = float("inf"), float("nan")


class _Number:
    """A float32, int32 or truth value of the function that is written; its operators are instructions of LLVM."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def like(self, other: Any) -> ir.Value:
        """The other operand; constants are of the type of this one."""
        return other.value if isinstance(other, _Number) else ir.Constant(self.value.type, other)

    def _made(self, name: str, other: Any) -> _Number:
        name = f"f{name}" if self.value.type == FLOAT else name
        return _Number(self.builder, getattr(self.builder, name)(self.value, self.like(other)))

    def __add__(self, other: Any) -> _Number:
        return self._made("add", other)

    def __sub__(self, other: Any) -> _Number:
        return self._made("sub", other)

    def __rsub__(self, other: Any) -> _Number:
        return _Number(self.builder, self.like(other)) - self

    def __mul__(self, other: Any) -> _Number:
        return self._made("mul", other)

    def __truediv__(self, other: Any) -> _Number:
        return self._made("div", other)

    def __rtruediv__(self, other: Any) -> _Number:
        return _Number(self.builder, self.like(other)) / self

    def __lshift__(self, other: int) -> _Number:
        return self._made("shl", other)

    def __rshift__(self, other: int) -> _Number:
        return self._made("ashr", other)

    def _compared(self, sign: str, other: Any) -> _Number:
        return _Number(self.builder, self.builder.fcmp_ordered(sign, self.value, self.like(other)))

    def __lt__(self, other: Any) -> _Number:
        return self._compared("<", other)

    def __gt__(self, other: Any) -> _Number:
        return self._compared(">", other)

    def equals(self, other: Any) -> _Number:
        return self._compared("==", other)

    def replaced(self, where: _Number, other: Any) -> _Number:
        """``other`` where that is true, else this."""
        return _Number(self.builder, self.builder.select(where.value, self.like(other), self.value))

    def at_least(self, low: float) -> _Number:
        return self.replaced(self < low, low)

    def at_most(self, high: float) -> _Number:
        return self.replaced(self > high, high)

    def called(self, name: str, *others: Any) -> _Number:
        """What an intrinsic of LLVM makes of this and other float32."""
        operands = [self.value, *map(self.like, others)]
        kind = ir.FunctionType(FLOAT, [FLOAT] * len(operands))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.f32")
        return _Number(self.builder, self.builder.call(function, operands))

    @property
    def bits(self) -> _Number:
        """Those of a float32 as int32, or of an int32 as float32."""
        return _Number(self.builder, self.builder.bitcast(self.value, INT if self.value.type == FLOAT else FLOAT))

    def as_float(self) -> _Number:
        """An int32 as a float32 of the same value."""
        return _Number(self.builder, self.builder.sitofp(self.value, FLOAT))


def _fused(a: _Number, b: Any, c: Any) -> _Number:
    """a b + c, rounded once where the processor can."""
    return a.called("fmuladd", b, c)


def _polynomial(x: _Number, *coefficients: float) -> _Number:
    """From the coefficient of the highest power. Horner's scheme of pairs: half as many steps wait for each other."""
    square, odd = x * x, len(coefficients) % 2
    pairs = [_fused(x, *coefficients[i : i + 2]) for i in range(odd, len(coefficients), 2)]
    total = _fused(square, coefficients[0], pairs.pop(0)) if odd else pairs.pop(0)
    for pair in pairs:
        total = _fused(total, square, pair)
    return total


LOG_2 = (0.693359375, -2.12194440e-4)  # their sum; small whole numbers times the first are exact
ROUND, ROUND_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: a number that it is added to becomes whole, in its last bits
MANTISSA, ONE_BITS, ROOT_BITS = 23, 0x3F800000, 0x3F3504F3  # ROOT_BITS: of the root of 1/2
SMALLEST_NORMAL = 2.0**-126

EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)
LOG += (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
# least largest errors of erf(x) / x - 1 in x^2 up to ERF_BORDER, and of erf(x) in x - ERF_MIDDLE from there to 4
ERF = (-6.829759513e-6, 9.981921903e-5, -8.250010433e-4, 5.199380219e-3, -2.685493603e-2, 1.128353626e-1)
ERF += (-3.761261702e-1, 1.283791661e-1)
ERF_BORDER, ERF_MIDDLE = 1.34375, 2.828125
ERF_FAR = (-6.253342690e-6, -8.388653441e-6, 6.544520875e-5, -4.470072236e-5, -1.612967317e-4)
ERF_FAR += (5.854459596e-4, -1.295297523e-3, 2.056493424e-3, -2.331802621e-3, 1.895831199e-3)
ERF_FAR += (-1.071228646e-3, 3.791575145e-4, 9.999365211e-1)


def _parts(x: _Number) -> tuple[_Number, _Number]:
    """n, an int32, and r in x = n log(2) + r, no further from 0 than log(2) / 2."""
    shifted = _fused(x, 1.4426950408889634, ROUND)
    n = shifted - ROUND
    r = _fused(n, -LOG_2[0], x)
    return shifted.bits - ROUND_BITS, _fused(n, -LOG_2[1], r)


def _power(n: _Number) -> _Number:
    """2^n, for n of -126 to 127."""
    return ((n << MANTISSA) + ONE_BITS).bits


def _from_one(r: _Number) -> _Number:
    """exp(r) - 1, for r as of `_parts`."""
    return _fused(_polynomial(r, *EXP), r * r, r)


def _exp_normal(x: _Number) -> _Number:
    """exp(x) of x from -87 to 88."""
    n, r = _parts(x)
    power = _power(n)
    return _fused(_from_one(r), power, power)


def _log_1p(r: _Number, n: _Number) -> _Number:
    """log(1 + r) + n log(2), for 1 + r between the roots of 1/2 and 2."""
    square = r * r
    low = _fused(r * square, _polynomial(r, *LOG), n * LOG_2[1])
    return _fused(n, LOG_2[0], r + _fused(square, -0.5, low))


def _log_limits(y: _Number, x: _Number, pole: float) -> _Number:
    """The logarithm ``y``, but what it is of infinity and NaN, at its pole and below."""
    y = (x + x).replaced(x < INFINITY, y)  # the sum: a NaN that signals must not stay one
    return y.replaced(x < pole, NAN).replaced(x.equals(pole), -INFINITY)


def _either(write: Callable[[_Number], _Number]) -> Any:
    """The function of `math` that has the name of ``write``; of a float32 it is what that writes."""
    usual = getattr(math, write.__name__)

    def typed(typingctx, x):  # type: ignore[no-untyped-def]
        if not isinstance(x, types.Integer | types.Float | types.Boolean):
            return None
        kind = types.float32 if x == types.float32 else types.float64

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if kind == types.float32:
                return write(_Number(builder, args[0])).value
            return context.get_function(usual, signature)(builder, args)

        return kind(kind), codegen

    typed.__name__, typed.__doc__ = write.__name__, write.__doc__
    return intrinsic(typed)


@_either
def exp(x: _Number) -> _Number:
    """At most 1.03 ulp; overflows and underflows gradually, rounded once."""
    n, r = _parts(x.at_least(-104.0).at_most(89.0))
    half = n >> 1  # 2^n itself may be no float32
    power = _power(half)
    return _fused(_from_one(r), power, power) * _power(n - half)


@_either
def expm1(x: _Number) -> _Number:
    """At most 1.54 ulp."""
    n, r = _parts(x.at_least(-18.0).at_most(89.0))
    half = _power(n - 1)  # of 2^n, which may be no float32
    y = _fused(half, _from_one(r), half - 0.5) * 2.0
    return y.replaced(x.called("fabs") < 2.0**-25, x)


@_either
def log(x: _Number) -> _Number:
    """At most 0.84 ulp."""
    small = x < SMALLEST_NORMAL
    bits = x.replaced(small, x * 2.0**MANTISSA).bits
    n = (bits - ROOT_BITS) >> MANTISSA
    r = (bits - (n << MANTISSA)).bits - 1.0
    n = n.replaced(small, n - MANTISSA)
    return _log_limits(_log_1p(r, n.as_float()), x, 0.0)


@_either
def log1p(x: _Number) -> _Number:
    """At most 1.40 ulp. What 1 + x is multiplied by, x is too, so that no bits of it are lost (N. Juffa)."""
    n = ((x + 1.0).bits - ROOT_BITS) >> MANTISSA
    four = _power(2 - n)  # times 2^-n, which may be no normal float32
    r = _fused(four, 0.25, -1.0) + x * four * 0.25
    y = _log_limits(_log_1p(r, n.as_float()), x, -1.0)
    return y.called("copysign", x)


@_either
def tanh(x: _Number) -> _Number:
    """At most 1.34 ulp."""
    size = x.called("fabs")
    square = size * size
    near = _fused(size * square, _polynomial(square, *TANH), size)
    far = 1.0 - 2.0 / (_exp_normal(size.at_most(10.0) * 2.0) + 1.0)
    return near.replaced(size > 0.625, far).called("copysign", x)


@_either
def erf(x: _Number) -> _Number:
    """At most 2.27 ulp: one polynomial near 0, one further away, fitted for this module."""
    size = x.called("fabs")
    near = _fused(_polynomial(x * x, *ERF), x, x)
    far = _polynomial(size.at_most(4.0) - ERF_MIDDLE, *ERF_FAR)
    return near.replaced(size > ERF_BORDER, far.called("copysign", x))
