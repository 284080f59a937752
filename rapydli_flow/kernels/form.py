"""Form: what a function of this package computes, and what its arguments are; and what several of them share.

Plain values only: nothing here touches memory. `prepared` runs what a form asks for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import nearest
from ..errors import DTypeError, SettingError, ShapeError
from ..graph import Fused
from ..ops import Add, Elu, Gelu, LeakyRelu, Op, Pointwise, Relu, Sigmoid, Softplus, Swish, Tanh
from ..ops.pointwise import formula_names
from ..spec import Spec

FLOATS = ("float32", "float64")
ACTIVATIONS: dict[str, Op] = {
    "elu": Elu(),
    "gelu": Gelu(),
    "leaky_relu": LeakyRelu(),
    "relu": Relu(),
    "sigmoid": Sigmoid(),
    "silu": Swish(),
    "softplus": Softplus(),
    "swish": Swish(),
    "tanh": Tanh(),
}
Specs = Mapping[str, Spec]


@dataclass(frozen=True, eq=False)  # the same as itself only: quick to look up
class Form:
    """``op`` gives the operator for specs of the operands that are given, by name, and ``how``: its other arguments."""

    name: str
    operands: tuple[str, ...]
    how: tuple[str, ...]
    op: Callable[..., Op]

    def of(self, specs: Specs, how: Sequence[Any], dtypes: Sequence[str] = FLOATS) -> tuple[Op, tuple[Spec, ...]]:
        """The operator and its inputs; ShapeError, DTypeError or SettingError for what does not fit together."""
        for name, spec in specs.items():
            if spec.dtype not in dtypes:
                raise refused_dtype(self, name, spec.dtype, dtypes)
        if len({spec.dtype for spec in specs.values()}) > 1:
            raise DTypeError(f"kernels.{self.name}: operands need one dtype ({listed(specs)}). Cast them first.")
        return self.op(self, specs, *how), tuple(specs.values())


def refused_dtype(form: Form, name: str, dtype: object, dtypes: Sequence[str] = FLOATS) -> DTypeError:
    """What is told of an operand that is none of these dtypes."""
    *most, last = dtypes
    return DTypeError(
        f"kernels.{form.name}: {name} has dtype {dtype}, but kernels compute in {', '.join(most)} or {last}. Cast all "
        "operands to one of them."
    )


def listed(specs: Specs) -> str:
    """``x f32[1,4,4,3], w f32[3,3,3,8]``"""
    return ", ".join(f"{name} {spec}" for name, spec in specs.items())


def frozen(form: Form, name: str, value: Any) -> Any:
    """An argument as a key: whole numbers are ints, sequences tuples. SettingError for what it cannot be."""
    if type(value) in (int, str, bool) or value is None or isinstance(value, Op):
        return value
    try:
        if hasattr(value, "__iter__"):
            return tuple(frozen(form, name, part) for part in value)
        return operator.index(value)
    except TypeError:
        raise SettingError(
            f"kernels.{form.name}: {name}={value!r} is not a whole number, or one for each axis. Give integers."
        ) from None


def with_tail(form: Form, anchor: Op, specs: Specs, activation: Any) -> Op:
    """``activation(anchor(two operands) + bias + residual)`` as one op."""
    (first, left), (second, right), *extras = specs.items()
    out = anchor.out_specs(left, right)[0]
    tail: list[tuple[Op, tuple[int, ...]]] = []
    for i, (name, spec) in enumerate(extras):
        wanted = Spec(out.shape[-1:] if name == "bias" else out.shape, out.dtype)
        if spec != wanted:
            why = "a number for each filter or column" if name == "bias" else "added to each element of the result"
            given = listed({first: left, second: right, name: spec})
            raise ShapeError(f"kernels.{form.name}: {name} is {spec} but must be {wanted}, {why} ({given}).")
        tail.append((Add(), (-1, i)))
    if activation is not None:
        tail.append((activation_of(form, activation, out), (-1,)))
    return Fused(anchor=anchor, arity=2, tail=tuple(tail)) if tail else anchor


def activation_of(form: Form, activation: Any, out: Spec) -> Op:
    """The operator of an activation: by name, or itself."""
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if _keeps(activation, out):
        chosen: Op = activation
        return chosen
    near = nearest(activation, ACTIVATIONS) if isinstance(activation, str) else ""
    raise SettingError(
        f"kernels.{form.name}: activation={activation!r} is not one of {', '.join(ACTIVATIONS)}, nor an operator of "
        f"one operand such as rapydli_flow.ops.LeakyRelu(slope=0.2).{near}"
    )


def _keeps(op: Any, out: Spec) -> bool:
    """Is this a pointwise operator of one operand, whose result is like it?"""
    one = isinstance(op, Pointwise) and not op.indexed and len(formula_names(op)) == 1
    return one and op.out_specs(out) == (out,)
