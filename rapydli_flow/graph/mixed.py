"""Mixed precision: a graph whose products read halves, and whose activations are stored as halves.

    w f32 -> cast -> conv -> + b f32 -> relu -> matmul (wide) -> + b f32 -> y f32
             f16     f16     f16       f16     f32              f32

Parameters, state, outputs and what is summed stay float32. The pass runs before gradients are taken, so their casts
come from the gradient of `Cast`; `wider` then takes casts of sums into the ops that make the sums. Why casts are
where they are: docs/design/mixed-precision.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..arguments import nearest
from ..errors import GraphError, SettingError
from ..ops import Cast, Labelled, Leaf, LogSoftmax, Moments, Op, Phase, Pointwise, Sum
from ..spec import HALVES
from .graph import Graph, Node, Tensor, Value
from .rewrite import check_graph, rewrite, tf32

PRECISIONS = ("float32", "tf32", *HALVES)
PRODUCTS = (
    *("conv", "conv_input_grad", "conv_filter_grad", "matmul", "batch_matmul"),
    *("local_conv", "local_conv_input_grad", "local_conv_filter_grad"),
)
WIDE = ("exp", "log", "power", "smooth_l1", "sigmoid_cross_entropy", LogSoftmax.name)  # halves would lose too much


def precision(graph: Graph, dtype: str) -> Graph:
    """The same network, computed in another precision; its parameters, state, inputs and outputs stay float32.

    'bfloat16', 'float16': matrix products and convolutions take halves and sum in float32; what lies between them is
    stored as halves. Statistics of norms, sums, exponentials, logarithms and losses are float32. 'tf32': products of
    float32 numbers may round those to 10 bits of mantissa. 'float32': the graph as it is.

    Raises SettingError for another name, GraphError for what is no network in float32.
    """
    check_precision(dtype)
    check_graph(graph, "precision")
    if graph.network is not None:
        raise GraphError(
            "precision: this is a training step. Give rf.train_step the precision, or the changed network."
        )
    found = {spec.dtype: node.name for node in graph.nodes for spec in node.specs if spec.floating}
    others = {name: where for name, where in found.items() if name != "float32"}
    if dtype in HALVES and others:
        name, where = next(iter(others.items()))
        what = "is in mixed precision already" if name in HALVES else f"computes in {name}"
        raise GraphError(f"precision: the graph {what} ({where} is {name}). Give it a network of float32.")
    if dtype == "tf32":
        return tf32(graph)
    return graph if dtype == "float32" else _Mixed(graph, dtype).run()


def check_precision(dtype: str) -> None:
    """SettingError unless it is one of `PRECISIONS`."""
    if dtype not in PRECISIONS:
        hint = nearest(str(dtype), PRECISIONS)
        raise SettingError(f"precision: {dtype!r} is not one of {', '.join(PRECISIONS)}.{hint}")


def precision_of(graph: Graph) -> str:
    """The precision that a network or training step computes in: one of `PRECISIONS`, or its parameters' dtype."""
    dtypes = {spec.dtype for node in graph.nodes for spec in node.specs if spec.floating}
    halves = [dtype for dtype in HALVES if dtype in dtypes]
    if halves:
        return halves[0]
    if any(getattr(node.op, "tf32", False) for node in graph.nodes):
        return "tf32"
    return next((leaf.dtype for leaf in graph.leaves("param") if leaf.spec.floating), "float32")


class _Mixed:
    def __init__(self, graph: Graph, half: str) -> None:
        self.graph, self.half = graph, half
        self.wanted = _wanted_wide(graph)
        self.casts: dict[tuple[Value, str], Tensor] = {}

    def run(self) -> Graph:
        new = rewrite(self.graph, self.rule)
        new.where = ""
        for values in (new.outputs, new.updates):
            values |= {name: self.cast(new, new.tensor(value), "float32").id for name, value in values.items()}
        new.where = None
        return rewrite(new)

    def rule(self, new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        if not inputs:
            return None
        new.scope = node.name.split("/")[:-1]
        op, ins = self.placed(new, node, inputs)
        new.scope = []
        return new.add(op, ins, node.name, node.at)

    def placed(self, new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> tuple[Op, Sequence[Tensor]]:
        """The op of a node, and its inputs in the dtypes that it is to read."""
        op: Any = node.op
        halves = any(x.dtype in HALVES for x in inputs)
        if op.name in PRODUCTS:
            wide = hasattr(op, "wide") and node.name in self.wanted
            return replace(op, wide=True) if wide else op, self.cast_all(new, inputs, self.half)
        if not halves or isinstance(op, Moments):
            return op, inputs
        if isinstance(op, Sum):
            one = all(inputs[0].shape[axis] == 1 for axis in op.axes)  # nothing is summed
            return op if one else replace(op, wide=True), inputs
        known = isinstance(op, Pointwise) or _ours(op)
        if op.name in WIDE or isinstance(op, Labelled) or not known:
            return op, self.cast_all(new, inputs, "float32")
        if isinstance(op, Pointwise):
            whole = any(x.dtype in HALVES and x.shape == node.specs[0].shape for x in inputs)
            as_they_are = whole and node.name not in self.wanted
            return op, inputs if as_they_are else self.cast_all(new, inputs, "float32")
        return op, self.cast_all(new, inputs, self.half)

    def cast_all(self, new: Graph, inputs: Sequence[Tensor], dtype: str) -> list[Tensor]:
        return [self.cast(new, x, dtype) for x in inputs]

    def cast(self, new: Graph, x: Tensor, dtype: str) -> Tensor:
        """``x`` in a floating dtype. One cast serves all that read an activation; of a parameter each reader has one
        until gradients are taken, so that they meet as float32."""
        if not x.spec.floating or x.dtype == dtype:
            return x
        op = new.nodes[x.node].op
        if isinstance(op, Leaf) and op.kind == "param":
            return _cast(new, x, dtype)
        if (x.id, dtype) not in self.casts:
            self.casts[x.id, dtype] = _cast(new, x, dtype)
        return self.casts[x.id, dtype]


def _cast(graph: Graph, x: Tensor, dtype: str) -> Tensor:
    made = graph.add(Cast(to=dtype), (x,))
    assert isinstance(made, Tensor)
    return made


def _ours(op: Op) -> bool:
    """Is it an op of this package? Of others it is not known whether they take halves."""
    return type(op).__module__.startswith("rapydli_flow.ops.")


def _wanted_wide(graph: Graph) -> set[str]:
    """Nodes whose output nothing reads but as float32: outputs of the graph, losses, and pointwise ops before those."""
    readers: dict[Value, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        for v in node.inputs:
            readers.setdefault(v, []).append(i)
    ends = {*graph.outputs.values(), *graph.updates.values()}
    wanted: set[str] = set()
    for i in reversed(range(len(graph.nodes))):
        read = [graph.nodes[j] for v in _values(graph, i) for j in readers.get(v, ())]
        ending = not ends.isdisjoint(_values(graph, i))
        if (read or ending) and all(_reads_wide(node, wanted) for node in read):
            wanted.add(graph.nodes[i].name)
    return wanted


def _reads_wide(node: Node, wanted: set[str]) -> bool:
    if node.op.name in WIDE or isinstance(node.op, Labelled):
        return True
    return isinstance(node.op, Pointwise | Phase) and node.name in wanted


def _values(graph: Graph, i: int) -> list[Value]:
    return [(i, k) for k in range(len(graph.nodes[i].specs))]


def wider(graph: Graph) -> Graph:
    """Sums of halves that only a cast to float32 reads are given as float32, and a cast that undoes one is left out.

    So the gradient of a parameter leaves its kernel as it was accumulated.
    """
    readers: Counter[Value] = Counter(v for node in graph.nodes for v in node.inputs)
    readers.update([*graph.outputs.values(), *graph.updates.values()])
    alone = {
        graph.nodes[node.inputs[0][0]].name
        for node in graph.nodes
        if isinstance(node.op, Cast) and node.op.to == "float32" and readers[node.inputs[0]] == 1
    }

    def rule(new: Graph, node: Node, inputs: tuple[Tensor, ...]) -> Any:
        op: Any = node.op
        if isinstance(op, Cast):
            (x,) = inputs
            if x.dtype == op.to:
                return x
            before = new.nodes[x.node]
            if isinstance(before.op, Cast) and op.to in HALVES and new.spec(before.inputs[0]).dtype == op.to:
                return new.tensor(before.inputs[0])
        if node.name in alone and node.specs[0].dtype in HALVES and getattr(op, "wide", None) is False:
            return new.add(replace(op, wide=True), inputs, node.name, node.at)
        return None

    return rewrite(rewrite(graph, rule))
