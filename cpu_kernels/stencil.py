"""From a function of a user's own to the body of a kernel: parameters become constants, arrays have their axes.

    def jacobi(task, u, v, *, rows, width): ...     what the user writes, on arrays of any rank

    def jacobi(task, u, v):                         what is compiled
        rows = 16
        width = 256
        H, W = (512, 512,)                          # was u.shape
        ...
    def parts(task, in_0, out_0, extras, at):       buffers of kernels are flat
        jacobi(task, shaped(in_0, (512, 512,)), shaped(out_0, (512, 512,)))

Shapes are constants in the text because a function is optimised before it is inlined: by extents that come with an
array, LLVM does not see that an index is never negative, and gathers instead of loading vectors.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llvmlite import ir
from numba import types as numba_types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from rapydli_flow.spec import Spec
from rapydli_flow.template import Loop

from .buffer import data
from .text import literal, references, replaced, written


@intrinsic
def shaped(typing, array, shape):  # type: ignore[no-untyped-def]
    """A flat array under the axes of ``shape``, a tuple of constants: the same memory.

    Not ``array.reshape``: that asks a function outside of the kernel for strides, which then are no constants.
    """
    kind = numba_types.Array(array.dtype, len(shape), "C")

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        sizes = cgutils.unpack_tuple(builder, args[1], len(shape))
        item = context.get_constant(numba_types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        strides, step = [], item
        for size in reversed(sizes):
            strides.insert(0, step)
            step = builder.mul(step, size)
        out = context.make_array(kind)(context, builder)
        populate_array(
            out, data(context, builder, array, args[0]), sizes, strides, item, ir.Constant(out.meminfo.type, None)
        )
        return out._getvalue()

    return kind(array, shape), codegen


@intrinsic
def natural(typingctx, i):  # type: ignore[no-untyped-def]
    """The index ``i``, which is promised not to be negative.

    Without the promise an index of a user's array may count from the end, and LLVM gathers instead of loading vectors.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.assume(builder.icmp_signed(">=", args[0], ir.Constant(args[0].type, 0)))
        return args[0]

    return numba_types.intp(numba_types.intp), codegen


def specialised(
    function: types.FunctionType,
    text: str,
    constants: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Callable[..., None]:
    """``function``, of source ``text``, with its keyword-only parameters as constants at its head.

    ``shapes``: what ``x.shape`` is, for arrays by name.
    """
    (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef))
    lines = replaced(text.splitlines(), [*_shapes_in(node, shapes or {})])
    first = node.body[0]
    head = f"def {node.name}({', '.join(a.arg for a in (*node.args.posonlyargs, *node.args.args))}):"
    if lines[first.lineno - 1][: first.col_offset].strip():  # def f(...): all on one line
        indent, top, rest = "    ", [], [f"    {lines[first.lineno - 1][first.col_offset :]}"]
    else:
        indent = lines[first.lineno - 1][: first.col_offset]
        documented = ast.get_docstring(node) is not None
        begin, middle = first.lineno - 1, first.end_lineno if documented else first.lineno - 1
        while lines[begin - 1].strip().startswith("#"):  # comments before the first statement
            begin -= 1
        middle = middle if documented else begin
        top, rest = lines[begin:middle], lines[middle : node.end_lineno]
    fixed = [f"{indent}{name} = {literal(value)}" for name, value in constants.items()]
    names = {name: value for name, value in references(function).items() if name != node.name}
    return written("\n".join([head, *top, *fixed, *rest]) + "\n", **names)


def _shapes_in(node: ast.FunctionDef, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[ast.expr, str]]:
    """Where a body asks for the shape of an array that it takes, and the answer."""
    found = [n for part in node.body for n in ast.walk(part)]
    taken = {n.id for n in found if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    for n in found:
        if not isinstance(n, ast.Attribute) or n.attr != "shape" or n.lineno != n.end_lineno:
            continue
        if isinstance(n.value, ast.Name) and n.value.id in shapes and n.value.id not in taken:
            yield n, literal(shapes[n.value.id])


def whole_arrays(body: Callable[..., None], tasks: int, groups: Sequence[Sequence[Spec]]) -> Loop:
    """The loop of a body that takes arrays with axes, and numbers where an operand has none.

    ``groups``: specs of inputs, outputs and workspaces.
    """
    names, given = [], []
    for kind, specs in zip(("in", "out", "work"), groups, strict=True):
        for i, spec in enumerate(specs):
            names.append(f"{kind}_{i}")
            number = kind == "in" and not spec.shape
            given.append(f"{kind}_{i}[0]" if number else f"shaped({kind}_{i}, {literal(spec.shape)})")
    text = f"def parts(task, {', '.join(names)}, extras, at):\n    body(natural(task), {', '.join(given)})\n"
    return Loop(written(text, body=body, shaped=shaped, natural=natural), tasks)
