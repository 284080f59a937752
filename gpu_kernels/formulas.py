"""Formulas on the lanes of a thread, as intrinsics: what reductions do to each element, written as text.

In formulas ``T`` makes a float32 constant; ``exp`` and ``larger`` are single instructions of the card.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import Array

from .pair import Pair, device_type
from .ptx import _number
from .scalar import MISSING, _compiled, _Vectorise

LOG2_E = math.log2(math.e)


def _exponential_rule(x: Any) -> Any:
    from llvmlite import ir

    kind = ir.FloatType()
    asm = ir.InlineAsm(ir.FunctionType(kind, [kind]), "ex2.approx.ftz.f32 $0, $1;", "=f,f")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.call(asm, [builder.fmul(args[0], ir.Constant(kind, float(np.float32(LOG2_E))))])

    return device_type("float32"), (device_type("float32"),), emit


def _larger_rule(a: Any, b: Any) -> Any:
    from llvmlite import ir

    kind = ir.FloatType()
    asm = ir.InlineAsm(ir.FunctionType(kind, [kind, kind]), "max.f32 $0, $1, $2;", "=f,f,f")
    f = device_type("float32")
    return f, (f, f), lambda context, builder, sig, args: builder.call(asm, args)


# For arguments of an exponential that are not positive: an error of 2^-22, of a result that is at most 1
exponential = Pair("exp", np.exp, _exponential_rule)
larger = Pair("larger", np.fmax, _larger_rule)  # a number wins over NaN
_FUNCTIONS = {"exp": exponential, "larger": larger}


@dataclass(frozen=True)
class Formula:
    """Results from the lanes ``a0, ..`` of a state, ``x0, ..`` of operands, the numbers that ``row`` names, which all
    lanes share, and the number ``j`` of the element."""

    results: tuple[str, ...]
    row: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()  # of results; float32 if none are told
    lines: tuple[str, ...] = ()
    together: bool = False  # all lanes have the number j, instead of j, j + 1, ..
    apart: bool = False  # each lane has numbers of its own, row[k][lane]

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.dtypes or ("float32",) * len(self.results)


def functions(text: str) -> tuple[Any, Any]:
    """A formula for the device, whose functions are made on first use, and one for the emulator."""
    vectors = ast.fix_missing_locations(_Vectorise().visit(ast.parse(text)))
    twins = {name: pair.twin for name, pair in _FUNCTIONS.items()}
    on_vectors = _compiled(vectors, {"T": np.float32, "numpy": np, **MISSING, **twins})

    def on_device() -> Any:
        return _compiled(text, {"T": np.float32, "math": math, **{n: pair.device for n, pair in _FUNCTIONS.items()}})

    return on_vectors, on_device


def definition(parameters: Sequence[str], lines: Sequence[str], results: Sequence[str]) -> str:
    """The text of a function ``formula``."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"def formula({', '.join(parameters)}):\n{body}    return ({', '.join(results)},)\n"


@cache
def lanewise(formula: Formula, states: int, operands: int, lanes: int) -> Pair:
    """``(state, operands, row, j) -> results``: state[k][lane], operands[k][lane], row[k]; lane i is element j + i."""
    of_row, apart = len(formula.row), formula.apart
    names = [*(f"a{k}" for k in range(states)), *(f"x{k}" for k in range(operands)), *formula.row, "j"]
    on_vectors, on_device = functions(definition(names, formula.lines, formula.results))
    step = 0 if formula.together else 1

    def twin(state: Any, values: Any, row: Any, j: Any) -> tuple[tuple[Array, ...], ...]:
        each = [
            on_vectors(
                *(part[i] for part in state),
                *(value[i] for value in values),
                *(number[i] if apart else number for number in row[:of_row]),
                j + i * step,
            )
            for i in range(lanes)
        ]
        return tuple(tuple(np.asarray(lane[k]).astype(d) for lane in each) for k, d in enumerate(formula.kinds))

    def rule(state: Any, values: Any, row: Any, j: Any) -> Any:
        from numba.cuda import types
        from numba.cuda.typing import signature

        kinds = [device_type(dtype) for dtype in formula.kinds]
        result = types.BaseTuple.from_types([types.UniTuple(kind, lanes) for kind in kinds])
        own = [*(part.dtype for part in state), *(value.dtype for value in values)]
        own += [number.dtype if apart else number for number in list(row)[:of_row]]
        one, function = signature(types.BaseTuple.from_types(kinds), *own, types.int32), on_device()

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            lists: list[list[Any]] = [[] for _ in kinds]
            for i in range(lanes):
                given = [builder.extract_value(args[0], [k, i]) for k in range(states)]
                given += [builder.extract_value(args[1], [k, i]) for k in range(operands)]
                given += [builder.extract_value(args[2], [k, i] if apart else k) for k in range(of_row)]
                found = context.compile_internal(
                    builder, function, one, [*given, builder.add(args[3], _number(i * step))]
                )
                for k, values in enumerate(lists):
                    values.append(builder.extract_value(found, k))
            made = [context.make_tuple(builder, result[k], values) for k, values in enumerate(lists)]
            return context.make_tuple(builder, result, made)

        return result, (state, values, row, types.int32), emit

    return Pair("lanewise", twin, rule)
