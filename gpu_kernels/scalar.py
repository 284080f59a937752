"""Pointwise formulas in kernels: a `Scalar`'s source text as an intrinsic, and where an element lies.

The text is compiled once for one element and called for each lane of a vector; the emulator runs it on
vectors, after a rewrite of what NumPy says otherwise (``a if c else b`` is ``where(c, a, b)``).
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np

from rapydli_flow import random
from rapydli_flow.spec import Array
from rapydli_flow.template import Scalar

from .pair import Pair, device_type, held

# functions of `math` that NumPy does not have
MISSING = {"erf": np.vectorize(math.erf, otypes=[np.float64])}


class _Vectorise(ast.NodeTransformer):
    """Rewrites an expression over numbers into one over NumPy arrays."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        parts = [self.visit(part) for part in (node.test, node.body, node.orelse)]
        return ast.Call(ast.parse("numpy.where", mode="eval").body, parts, [])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ast.Call(ast.parse("numpy.logical_not", mode="eval").body, [operand], [])
        return ast.UnaryOp(node.op, operand)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name(node.attr, node.ctx) if node.attr in MISSING else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name("numpy" if node.id == "math" else node.id, node.ctx)


def _text(scalar: Scalar) -> str:
    lines = "".join(f"    {line}\n" for line in scalar.lines)
    return (
        f"def formula({', '.join((*scalar.parameters, 'index'))}):\n{lines}    return ({', '.join(scalar.results)},)\n"
    )


def _compiled(tree: ast.Module | str, names: dict[str, Any]) -> Any:
    exec(compile(tree, "<formula>", "exec"), names)
    return names["formula"]


def _subroutine(name: str, function: Any, result: str, parameters: Sequence[str]) -> Any:
    """A plain function of numbers as an intrinsic."""

    def rule(*types: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.compile_internal(builder, function, sig, args)

        return device_type(result), tuple(map(device_type, parameters)), emit

    rule.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return Pair(name, function, rule).device


def _rebound(function: Any, **names: Any) -> Any:
    return type(function)(function.__code__, {**function.__globals__, **names}, function.__name__)


@cache
def _keep() -> Any:
    """`random.keep`, with the functions that it calls, on the device."""
    u = "uint64"
    mix = _subroutine("mix", random.mix, u, [u])
    bits = _subroutine("random_bits", _rebound(random.random_bits, mix=mix), u, [u] * 4)
    return _subroutine("keep", _rebound(random.keep, random_bits=bits), "boolean", [u] * 5)


@cache
def formula(scalar: Scalar, dtypes: tuple[str, ...], out: str, lanes: int) -> Pair:
    """``(values, index) -> results``: values[operand][lane], results[output][lane]; lane j is element index + j."""
    text = _text(scalar)
    out = held(out)
    of_type: dict[str, Any] = {"T": np.dtype(out).type, "U": np.uint64}
    vectors = ast.fix_missing_locations(_Vectorise().visit(ast.parse(text)))
    on_vectors = _compiled(vectors, {**of_type, **MISSING, "numpy": np, "keep": random.keep})

    def twin(values: Sequence[Sequence[Array]], index: Array) -> tuple[tuple[Array, ...], ...]:
        each = [
            on_vectors(*(value[j] for value in values), np.asarray(index, np.uint64) + np.uint64(j))
            for j in range(lanes)
        ]
        return tuple(tuple(np.asarray(lane[k]).astype(out) for lane in each) for k in range(len(scalar.results)))

    def rule(values: Any, index: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        names = {**of_type, "math": math}
        if "keep" in scalar.uses:
            names["keep"] = _keep()
        element, u64 = device_type(out), types.uint64
        function, count = _compiled(text, names), len(scalar.results)
        lane_type, one_result = types.UniTuple(element, lanes), types.UniTuple(element, count)
        results = types.UniTuple(lane_type, count)
        parameters = types.BaseTuple.from_types([types.UniTuple(device_type(d), lanes) for d in dtypes])
        signature = one_result(*map(device_type, dtypes), u64)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            each = []
            for j in range(lanes):
                operands = [builder.extract_value(args[0], [k, j]) for k in range(len(dtypes))]
                place = builder.add(args[1], ir.Constant(ir.IntType(64), j))
                each.append(context.compile_internal(builder, function, signature, [*operands, place]))
            by_output = [
                context.make_tuple(builder, lane_type, [builder.extract_value(lane, k) for lane in each])
                for k in range(count)
            ]
            return context.make_tuple(builder, results, by_output)

        return results, (parameters, u64), emit

    return Pair("formula", twin, rule)


def _mixed_radix(sizes: Sequence[int | np.integer[Any]], term: Callable[[int, Any], Any], element: Any) -> Any:
    """Sum over axes of ``term(axis, coordinate)`` for the element of an array of these sizes."""
    total, rest = 0, element
    for axis in reversed(range(len(sizes))):
        coordinate = rest if axis == 0 else rest % sizes[axis]
        rest = rest if axis == 0 else rest // sizes[axis]
        total = total + term(axis, coordinate)
    return total


@cache
def project(out: tuple[int, ...], shape: tuple[int, ...]) -> Pair:
    """``(element) -> element``: which element of an operand of ``shape`` is broadcast to an element of ``out``."""
    skip = len(out) - len(shape)
    strides = {
        skip + axis: prod(shape[axis + 1 :]) for axis, size in enumerate(shape) if size == out[skip + axis] and size > 1
    }

    def twin(element: Any) -> Any:
        return _mixed_radix(out, lambda axis, at: at * strides[axis] if axis in strides else 0, element)

    def rule(element: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def number(value: int) -> Any:
            return ir.Constant(ir.IntType(32), value)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            total, rest = number(0), args[0]
            for axis in reversed(range(len(out))):
                at = rest if axis == 0 else builder.urem(rest, number(out[axis]))
                rest = rest if axis == 0 else builder.udiv(rest, number(out[axis]))
                if axis in strides:
                    total = builder.add(total, builder.mul(at, number(strides[axis])))
            return total

        return types.int32, (types.int32,), emit

    return Pair("project_" + "_".join(map(str, out)) + "_from_" + "_".join(map(str, shape)), twin, rule)


def _same_rule(element: Any) -> Any:
    from numba.cuda import types

    return types.int32, (types.int32,), lambda context, builder, sig, args: args[0]


itself = Pair("itself", lambda element: element, _same_rule)  # `project` for operands of the output's shape


@cache
def place(out: tuple[int, ...]) -> Pair:
    """``(element, at) -> index``: where an element of the block ``out`` lies in the whole array, as uint64."""

    def twin(element: Any, at: Any) -> Array:
        where = at.data.astype(np.uint64)
        strides = [np.prod(where[len(out) + axis + 1 :], dtype=np.uint64) for axis in range(len(out))]
        element = np.asarray(element).astype(np.uint64)
        index = _mixed_radix(
            [np.uint64(size) for size in out], lambda axis, at: (at + where[axis]) * strides[axis], element
        )
        return np.asarray(index, np.uint64)

    def rule(element: Any, at: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        wide = ir.IntType(64)

        def number(value: int) -> Any:
            return ir.Constant(ir.IntType(32), value)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def read(i: int) -> Any:
                return builder.load(builder.gep(args[1], [number(i)]))

            total, rest, stride = ir.Constant(wide, 0), args[0], ir.Constant(wide, 1)
            for axis in reversed(range(len(out))):
                coordinate = rest if axis == 0 else builder.urem(rest, number(out[axis]))
                rest = rest if axis == 0 else builder.udiv(rest, number(out[axis]))
                along = builder.add(builder.zext(coordinate, wide), read(axis))
                total = builder.add(total, builder.mul(along, stride))
                stride = builder.mul(stride, read(len(out) + axis))
            return total

        return types.uint64, (types.int32, types.CPointer(types.int64)), emit

    return Pair("place_" + "_".join(map(str, out)), twin, rule)


@cache
def nowhere() -> Pair:
    """`place` for formulas that use no index."""

    def rule(element: Any, at: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        zero = ir.Constant(ir.IntType(64), 0)
        return types.uint64, (types.int32, types.CPointer(types.int64)), lambda *_: zero

    return Pair("nowhere", lambda element, at: np.uint64(0), rule)


@cache
def counted() -> Pair:
    """`place` for formulas whose index counts the elements of the block."""

    def rule(element: Any, at: Any) -> Any:
        from llvmlite import ir
        from numba.cuda import types

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.zext(args[0], ir.IntType(64))

        return types.uint64, (types.int32, types.CPointer(types.int64)), emit

    return Pair("counted", lambda element, at: np.asarray(element).astype(np.uint64), rule)
