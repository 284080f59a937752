"""Local response normalisation across channels: a thread has a few neighbouring channels of one place.

    local_response        y  = x d^-beta,     d[c] = k + alpha / size * sum of x^2 over the window of c
    local_response_grad   dx = dy d^-beta - 2 alpha beta / size * x * sum of dy x d^(-beta-1) over the mirrored window

It loads the vectors that its windows reach, which its neighbours load too, from the cache; sums are written out.
Powers are 2^(-beta log2 d), by the two instructions that every card has for that: errors of 2^-22 and less each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rapydli_flow.spec import HALVES, Spec
from rapydli_flow.template import Config, Device, Epilogue, Rule, broken, template

from .copies import countable, narrow
from .grid import Grid, blocks_of
from .pair import Pair
from .ptx import append, cuda, inside, load, unroll
from .tail import tail

SPACE = {"threads": (256, 128, 512), "vector": (4, 2, 1, 8)}
MOST_LOADED = 64  # elements of each operand in a thread


@dataclass(frozen=True)
class Response:
    """The windows of ``lanes`` channels: ``low`` below a channel, ``high`` above it."""

    lanes: int
    low: int
    high: int
    share: float
    k: float
    beta: float
    slope: float
    back: bool  # the gradient reaches the windows of all channels whose windows hold one

    @classmethod
    def of(cls, op: Any, lanes: int, *, back: bool) -> Response:
        slope = 2.0 * op.alpha * op.beta / op.size
        return cls(lanes, op.size // 2, (op.size - 1) // 2, op.alpha / op.size, op.k, op.beta, slope, back)

    @property
    def vectors(self) -> tuple[int, int]:
        """How many vectors before and behind the thread's own are read."""
        reach = (self.low + self.high,) * 2 if self.back else (self.low, self.high)
        return blocks_of(reach[0], self.lanes), blocks_of(reach[1], self.lanes)

    def sums(self, terms: Callable[[int], Any], plus: Callable[[Any, Any], Any], low: int, high: int, at: int) -> Any:
        """terms[at - low] + ... + terms[at + high], in this order."""
        total = terms(at - low)
        for j in range(at - low + 1, at + high + 1):
            total = plus(total, terms(j))
        return total


class _Numpy:
    """Arithmetic on vectors over threads."""

    def number(self, value: float) -> Any:
        return np.float32(value)

    def plus(self, a: Any, b: Any) -> Any:
        return a + b

    def times(self, a: Any, b: Any) -> Any:
        return a * b

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return a * b + c

    def log2(self, a: Any) -> Any:
        return np.log2(a)

    def exp2(self, a: Any) -> Any:
        return np.exp2(a)

    def power(self, a: Any, exponent: float) -> Any:
        return self.exp2(self.times(self.number(exponent), self.log2(a)))


class _Emitted(_Numpy):
    """The same as LLVM IR."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir

        self._builder, self._kind = builder, ir.FloatType()

    def number(self, value: float) -> Any:
        from llvmlite import ir

        return ir.Constant(self._kind, float(np.float32(value)))

    def plus(self, a: Any, b: Any) -> Any:
        return self._builder.fadd(a, b)

    def times(self, a: Any, b: Any) -> Any:
        return self._builder.fmul(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        from llvmlite import ir

        fused = self._builder.module.declare_intrinsic(
            "llvm.fma", [self._kind], ir.FunctionType(self._kind, [self._kind] * 3)
        )
        return self._builder.call(fused, [a, b, c])

    def _one(self, text: str, a: Any) -> Any:
        from llvmlite import ir

        return self._builder.call(ir.InlineAsm(ir.FunctionType(self._kind, [self._kind]), text, "=f,f"), [a])

    def log2(self, a: Any) -> Any:
        return self._one("lg2.approx.f32 $0, $1;", a)

    def exp2(self, a: Any) -> Any:
        return self._one("ex2.approx.f32 $0, $1;", a)


@cache
def respond(r: Response) -> Pair:
    """``(vectors of x) -> y`` or ``(vectors of x, vectors of dy) -> dx`` for the middle vector's channels."""
    first = r.vectors[0] * r.lanes

    def forward(x: Sequence[Any], m: _Numpy) -> list[Any]:
        squares = [m.times(v, v) for v in x]

        def power(j: int) -> Any:
            total = r.sums(squares.__getitem__, m.plus, r.low, r.high, first + j)
            return m.power(m.fma(m.number(r.share), total, m.number(r.k)), -r.beta)

        return [m.times(x[first + j], power(j)) for j in range(r.lanes)]

    def backward(x: Sequence[Any], dy: Sequence[Any], m: _Numpy) -> list[Any]:
        squares = [m.times(v, v) for v in x]
        logarithms, reached = {}, {}
        for c in range(first - r.high, first + r.lanes + r.low):
            total = r.sums(squares.__getitem__, m.plus, r.low, r.high, c)
            logarithms[c] = m.log2(m.fma(m.number(r.share), total, m.number(r.k)))
            term = m.exp2(m.times(m.number(-r.beta - 1.0), logarithms[c]))
            reached[c] = m.times(m.times(dy[c], x[c]), term)
        found = []
        for c in range(first, first + r.lanes):
            total = r.sums(reached.__getitem__, m.plus, r.high, r.low, c)
            own = m.times(dy[c], m.exp2(m.times(m.number(-r.beta), logarithms[c])))
            found.append(m.fma(m.times(m.number(-r.slope), x[c]), total, own))
        return found

    def results(x: Sequence[Any], dy: Sequence[Any] | None, m: _Numpy) -> list[Any]:
        return forward(x, m) if dy is None else backward(x, dy, m)

    def in_order(vectors: Sequence[Sequence[Any]]) -> list[Any]:
        return [value for vector in vectors for value in vector]

    def twin(*operands: Any) -> tuple[Any, ...]:
        values = [in_order(vectors) for vectors in operands]
        return tuple(np.float32(v) for v in results(values[0], values[1] if r.back else None, _Numpy()))

    def emitted(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def unpacked(packed: Any, count: int) -> list[Any]:
            return [builder.extract_value(packed, [i, j]) for i in range(count) for j in range(r.lanes)]

        count = sum(r.vectors) + 1
        values = [unpacked(packed, count) for packed in args]
        found = results(values[0], values[1] if r.back else None, _Emitted(builder))
        return context.make_tuple(builder, sig.return_type, found)

    def rule_forward(x: Any) -> Any:
        from numba.cuda import types

        return types.UniTuple(types.float32, r.lanes), (x,), emitted

    def rule_backward(x: Any, dy: Any) -> Any:
        from numba.cuda import types

        return types.UniTuple(types.float32, r.lanes), (x, dy), emitted

    return Pair("respond_back" if r.back else "respond", twin, rule_backward if r.back else rule_forward)


def _floats(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> bool:
    return outs[0].dtype == "float32" or outs[0].dtype in HALVES


def _in_vectors(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device, *, vector: int) -> bool:
    """Vectors divide channels; what windows reach is in registers."""
    before, behind = Response.of(op, vector, back=len(ins) == 2).vectors
    return outs[0].shape[-1] % vector == 0 and (before + behind + 1) * vector <= MOST_LOADED


RULES: dict[str, Rule] = {
    "float32 or halves": _floats,
    "32-bit indices": countable,
    "16 bytes at once": narrow,
    "vectors in registers": _in_vectors,
}


def prefer(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], device: Device) -> Config:
    """The widest vectors."""
    tried = [{"threads": 128, "vector": v} for v in (8, 4, 2, 1)]
    return next((c for c in tried if broken(RULES, op, ins, outs, device, c) is None), tried[-1])


def _kernel(
    op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, *, threads: int, vector: int
) -> Grid:
    back, out = len(ins) == 2, outs[0]
    r = Response.of(op, vector, back=back)
    (before, behind), channels, size = r.vectors, out.shape[-1], out.size
    count = before + behind + 1
    read, end, apply = load(out.dtype, vector, constant=True), tail(epilogue, vector), respond(r)
    own = len(ins) - 1  # x is the last operand

    def kernel(ins: Any, outs: Any, work: Any, extras: Any, at: Any) -> None:
        element = (cuda.blockIdx.x * threads + cuda.threadIdx.x) * vector
        on = element < size
        channel = element % channels
        x = ()
        dy = ()
        for i in unroll(count):
            active = on & inside(channel + (i - before) * vector, channels)
            x = append(x, read(active, ins[own], element + (i - before) * vector))
            if back:
                dy = append(dy, read(active, ins[0], element + (i - before) * vector))
        if back:
            end.finish(on, outs[0], apply(x, dy), element, channel, extras, at)
        else:
            end.finish(on, outs[0], apply(x), element, channel, extras, at)

    return Grid(kernel, blocks_of(size, threads * vector), threads)


@template("local_response", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def channels(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """One pass over x."""
    return _kernel(op, ins, outs, epilogue, **config)


@template("local_response_grad", "cuda", space=SPACE, fits=RULES, prefer=prefer)
def gradients(op: Any, ins: Sequence[Spec], outs: Sequence[Spec], epilogue: Epilogue, **config: int) -> Grid:
    """One pass over dy and x."""
    return _kernel(op, ins, outs, epilogue, **config)
