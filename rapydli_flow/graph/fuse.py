"""Fusion: a pointwise op moves into the op that makes its operand, as an epilogue.

A `Fused` op is an anchor and a pointwise tail. It is an op like any other, without a gradient; its
reference is the composition. Fuse after splitting: a sum over ranks must come before the tail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from ..errors import GraphError
from ..ops import (
    Add,
    Conv,
    Dropout,
    Fill,
    Leaf,
    Matmul,
    Moments,
    Multiply,
    Op,
    Pointwise,
    Relu,
    ReluGrad,
    Sample,
    Scale,
    Slice,
    Sum,
    Tanh,
)
from ..ops.base import Reject, refuse
from ..ops.formula import trace
from ..spec import Block, Spec
from ..template import Epilogue, Scalar, Shape, reach
from .graph import Graph, Node, Tensor, Value
from .rewrite import rewrite

Step = tuple[Op, tuple[int, ...]]


class Fused(Op):
    """``anchor`` and the pointwise ops that follow it.

    The first ``arity`` inputs are the anchor's, the others extras of the tail. Each step of the tail
    is an op and where its operands come from: -1 is the value so far, i the i-th extra.
    """

    anchor: Op
    arity: int
    tail: tuple[Step, ...] = ()

    @property
    def indexed(self) -> bool:  # type: ignore[override]
        return self.anchor.indexed or any(op.indexed for op, _ in self.tail)

    @property
    def title(self) -> str:
        return "+".join([self.anchor.title, *(op.title for op, _ in self.tail)])

    def infer(self, *inputs: Spec) -> Any:
        out = self.anchor.infer(*inputs[: self.arity])
        if not isinstance(out, Spec):
            raise GraphError(f"fused: {self.anchor.name} has {len(out)} outputs; a tail follows an op with one.")
        found = self._reach(inputs, out.shape)
        mixed = "element" in found or self.indexed  # then places go by the output's elements
        for i, (extra, how) in enumerate(zip(inputs[self.arity :], found, strict=True)):
            if how == "nowhere" or (how == "source" and mixed):
                rule = f"extra {i} must be a scalar, or have the shape or the channels of the output {out}"
                raise refuse(self, rule, {f"e{i}": extra}, "Leave the op that reads it outside the tail.")
        return out

    def _reach(self, inputs: Sequence[Any], out: Shape) -> list[str]:
        """How the tail of an output of this shape reads each extra; see `rapydli_flow.template.reach`."""
        source = inputs[0].shape if isinstance(self.anchor, Slice) else None
        return [reach(extra.shape, out, source) for extra in inputs[self.arity :]]

    def index(self, *inputs: Spec) -> str:
        body, bar, given = self.anchor.index(*inputs[: self.arity]).partition("|")
        left, out = (side.strip() for side in body.split("->"))
        named = {"element": out, "source": left, "channel": out.split()[-1], "scalar": "()"}
        extras = (named[how] for how in self._reach(inputs, self.infer(*inputs).shape))
        return f"{', '.join([left, *extras])} -> {out} {bar}{given}".strip()

    def local(self, ins: Sequence[Block], outs: Sequence[Block]) -> Op:
        return replace(self, anchor=self.anchor.local(ins[: self.arity], outs))

    def reference(self, *inputs: Any, **at: Block) -> Any:
        where = at.get("at")
        y = self.anchor.run(*inputs[: self.arity], at=where)[0]
        reads = zip(inputs[self.arity :], self._reach(inputs, y.shape), strict=True)
        extras = [self.anchor.run(x)[0] if how == "source" else x for x, how in reads]
        for op, slots in self.tail:
            y = op.run(*(y if s < 0 else extras[s] for s in slots), at=where)[0]
        return y

    def epilogue(self, *inputs: Spec) -> Epilogue:
        """The tail as source text, for templates."""
        extras = inputs[self.arity :]
        names = ("v", *(f"e{i}" for i in range(len(extras))))
        indexed = any(op.indexed for op, _ in self.tail)

        def formula(v: Any, *rest: Any) -> Any:
            values, index = (rest[:-1], rest[-1:]) if indexed else (rest, ())
            for op, slots in self.tail:
                assert isinstance(op, Pointwise)
                v = op.formula(*(v if s < 0 else values[s] for s in slots), *(index if op.indexed else ()))
            return v

        scalar: Scalar = trace(formula, names, indexed=indexed)
        source = inputs[0] if isinstance(self.anchor, Slice) else None
        return Epilogue(scalar, tuple(extras), self.out_specs(*inputs)[0], source)

    def flops(self, *inputs: Spec) -> int:
        out = self.out_specs(*inputs)[0]
        reads = zip(inputs[self.arity :], self._reach(inputs, out.shape), strict=True)
        extras = [Spec(out.shape, x.dtype) if how == "source" else x for x, how in reads]
        tail = sum(op.flops(*(out if s < 0 else extras[s] for s in slots)) for op, slots in self.tail)
        return self.anchor.flops(*inputs[: self.arity]) + tail

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return _samples()

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        one, two = (cls(anchor=op, arity=2, tail=((Add(), (-1, 0)),)) for op in (Matmul(), Moments()))
        a, b, c = Spec((7, 9)), Spec((9, 17)), Spec((9,))
        return (
            Reject(one, (a, b, Spec((7, 1))), r"fused: extra 0 must be a scalar, .* f32\[7,17\] \(e0 f32\[7,1\]\)"),
            Reject(one, (a, a, Spec((17,))), "matmul: a gives 9 values but b expects 7"),
            Reject(two, (a, c, c), "fused: moments has 2 outputs"),
        )


def parts(op: Op, inputs: Sequence[Spec]) -> tuple[Op, tuple[Spec, ...], Epilogue]:
    """What a template is asked for: the anchor, the specs of its inputs, and the epilogue."""
    if isinstance(op, Fused):
        return op.anchor, tuple(inputs[: op.arity]), op.epilogue(*inputs)
    return op, tuple(inputs), Epilogue.none(op.out_specs(*inputs)[0])


def fuse(graph: Graph, apart: Container[str] = ()) -> Graph:
    """Move every pointwise op with one host into that host, if nothing else reads the value between.

    Nodes whose names are in ``apart`` stay as they are.
    """
    users: Counter[Value] = Counter(v for node in graph.nodes for v in node.inputs)
    users.update([*graph.outputs.values(), *graph.updates.values()])
    single = {
        node.name for i, node in enumerate(graph.nodes) if users[i, 0] == 1 and len(node.specs) == 1 and _hosts(node)
    }

    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        if not isinstance(node.op, Pointwise) or len(node.specs) > 1 or node.name in apart:
            return None
        for j, x in enumerate(inputs):
            host = new.nodes[x.node]
            if host.name in single and x.spec == node.specs[0]:
                made = _absorb(new, host, node, inputs, j)
                if made is not None:
                    return made
        return None

    return rewrite(rewrite(graph, rule))


def _absorb(new: Graph, host: Node, node: Node, inputs: tuple[Tensor, ...], j: int) -> Any:
    extras = [y for k, y in enumerate(inputs) if k != j]
    out = node.specs[0]
    if any(reach(y.spec.shape, out.shape) == "nowhere" for y in extras) or any(y.id == inputs[j].id for y in extras):
        return None
    op = host.op if isinstance(host.op, Fused) else Fused(anchor=host.op, arity=len(host.inputs))
    first = len(host.inputs) - op.arity
    slots = tuple(-1 if k == j else first + sum(1 for i in range(k) if i != j) for k in range(len(inputs)))
    op = replace(op, tail=(*op.tail, (node.op, slots)))
    return new.add(op, (*map(new.tensor, host.inputs), *extras), node.name, node.at or host.at)


def _hosts(node: Node) -> bool:
    """Can this node take a tail? Sources, collectives and views cannot, nor what says so."""
    if isinstance(node.op, Leaf | Fill) or node.op.collective or node.op.view or not node.op.takes_tail:
        return False
    return node.specs[0].floating and node.specs[0].shape != ()


def _samples() -> tuple[Sample, ...]:
    x, w, bias, y = Spec((2, 5, 6, 3)), Spec((3, 3, 3, 5)), Spec((5,)), Spec((2, 5, 6, 5))
    conv = Conv(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    clock = Spec((), "int64")
    relu, add, grad = (Relu(), (-1,)), (Add(), (-1, 0)), (ReluGrad(), (-1, 0))
    a, b = Spec((7, 9)), Spec((9, 17))
    cut = Slice(starts=(0, 1, 2, 1), stops=(2, 4, 6, 4), steps=(1, 1, 2, 1))
    return (
        Sample(Fused(anchor=conv, arity=2, tail=(add, relu)), (x, w, bias)),
        Sample(Fused(anchor=conv, arity=2, tail=(add, (Add(), (1, -1)), relu)), (x, w, bias, y)),
        Sample(
            Fused(anchor=conv, arity=2, tail=(add, (Dropout(rate=0.3, stream=5), (-1, 1, 2)))),
            (x, w, bias, clock, clock),
            {3: (0, 99), 4: (0, 99)},
        ),
        Sample(Fused(anchor=Matmul(), arity=2, tail=(add, (Tanh(), (-1,)))), (a, b, Spec((17,)))),
        Sample(Fused(anchor=Matmul(tb=True), arity=2, tail=(grad,)), (a, Spec((17, 9)), Spec((7, 17)))),
        Sample(Fused(anchor=Multiply(), arity=2, tail=(add, relu)), (y, bias, y)),
        Sample(Fused(anchor=cut, arity=1, tail=(grad,)), (y, y)),
        Sample(Fused(anchor=Sum(axes=(0,)), arity=1, tail=((Scale(by=0.5), (-1,)),)), (a,)),
    )
