"""Buffers: what the arrays of a kernel are to Numba, an address and a dtype.

An array of Numba's brings its extents along, strides, and an owner whose references are counted, and its indices may
count from the end: LLVM then gathers elements instead of loading vectors wherever it does not see that none is
negative. A kernel knows all extents when it is compiled, and its indices count from the beginning.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model


class Buffer(types.Type):
    """Numba type of so many elements of ``dtype`` as its owner knows of, one behind the other."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Buffer({dtype})")


@register_model(Buffer)
class _BufferModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, buffer: Buffer) -> None:
        super().__init__(manager, buffer, manager.lookup(buffer.dtype).get_data_type().as_pointer())


@infer_global(operator.getitem)
class _Read(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        buffer, index = args
        if isinstance(buffer, Buffer) and isinstance(index, types.Integer):
            return signature(buffer.dtype, buffer, types.intp)
        return None


@infer_global(operator.setitem)
class _Write(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        buffer, index, _ = args
        if isinstance(buffer, Buffer) and isinstance(index, types.Integer):
            return signature(types.none, buffer, types.intp, buffer.dtype)
        return None


@lower_builtin(operator.getitem, Buffer, types.intp)
def _read(context, builder, signature, args):  # type: ignore[no-untyped-def]
    return context.unpack_value(builder, signature.return_type, builder.gep(args[0], [args[1]]))


@lower_builtin(operator.setitem, Buffer, types.intp, types.Any)
def _write(context, builder, signature, args):  # type: ignore[no-untyped-def]
    context.pack_value(builder, signature.args[2], args[2], builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()


def data(context: Any, builder: Any, kind: types.Type, value: ir.Value) -> ir.Value:
    """The address of the first element of a buffer or of an array of Numba's."""
    return value if isinstance(kind, Buffer) else context.make_array(kind)(context, builder, value).data


def constant(name: str, given: Any) -> int:
    """The value of an argument that the compiler must know; ``name``: of the argument, for the error."""
    if not isinstance(given, types.IntegerLiteral):
        raise TypingError(f"{name} is not a constant but {given}. Make it a free variable of the kernel, not a sum.")
    return int(given.literal_value)


@intrinsic(prefer_literal=True)
def flat(typing, buffers, i, dtype):  # type: ignore[no-untyped-def]
    """The i-th of a kernel's buffers, in the entry of a generated module."""
    kind = Buffer(dtype.dtype)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = builder.load(builder.gep(args[0], [ir.Constant(ir.IntType(64), i.literal_value)]))
        return builder.inttoptr(address, context.get_value_type(kind))

    return kind(buffers, i, dtype), codegen


@intrinsic(prefer_literal=True)
def local(typing, size, like):  # type: ignore[no-untyped-def]
    """An uninitialised buffer of a constant size and the dtype of ``like``, on the stack of the caller."""
    kind, count = Buffer(like.dtype), constant("local: size", size)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        with builder.goto_entry_block():
            memory = builder.alloca(context.get_data_type(like.dtype), size=ir.Constant(ir.IntType(64), count))
            memory.align = 64
        return memory

    return kind(size, like), codegen


@intrinsic
def same(typing, one, other):  # type: ignore[no-untyped-def]
    """Do two buffers lie at one address?"""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.icmp_unsigned("==", *(builder.ptrtoint(a, ir.IntType(64)) for a in args))

    return types.boolean(one, other), codegen
