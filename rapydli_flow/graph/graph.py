"""Graph: nodes (an op and its inputs) in topological order. Networks, training steps and updates are all graphs.

A graph is grown by applying ops to its tensors, and from then on only read: passes make new graphs.
A value is named by ``(node number, output number)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import GraphError, RapydliError
from ..ops import Abs, Fill, Leaf, Matmul, Op, Power, Scale, Slice, Sum, Symbol, registry
from ..spec import Block, Spec
from .draw import html, svg
from .table import text
from .where import caller, located

Value = tuple[int, int]


@dataclass(frozen=True)
class Node:
    """One op applied to values.

    ``at`` is where output 0 lies in the whole array, on rank graphs; ``where`` the user's file and line.
    """

    name: str
    op: Op
    inputs: tuple[Value, ...]
    specs: tuple[Spec, ...]
    at: Block | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True, eq=False)
class Tensor(Symbol):
    """A value of a graph that is being built."""

    graph: Graph
    node: int
    out: int = 0

    @property
    def id(self) -> Value:
        return self.node, self.out

    @property
    def name(self) -> str:
        return self.graph.nodes[self.node].name

    @property
    def spec(self) -> Spec:
        return self.graph.nodes[self.node].specs[self.out]

    def apply(self, op: Op, inputs: Sequence[Any]) -> Any:
        for x in inputs:
            if not isinstance(x, Tensor) or x.graph is not self.graph:
                raise GraphError(f"{op.name}: operands are of different graphs, or not tensors: {x!r}.")
        return self.graph.add(op, inputs)

    def __add__(self, other: Any) -> Any:
        return self.graph.arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self.graph.arithmetic("add", self, other)

    def __sub__(self, other: Any) -> Any:
        return self.graph.arithmetic("subtract", self, other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        return self.graph.arithmetic("multiply", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.graph.arithmetic("multiply", self, other)

    def __truediv__(self, other: Any) -> Any:
        return self.graph.arithmetic("divide", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        return self.graph.add(Fill(value=float(other), shape=(), dtype=self.spec.dtype)) / self

    def __neg__(self) -> Any:
        return self * -1.0

    def __pow__(self, exponent: Any) -> Any:
        if not isinstance(exponent, int | float):
            raise GraphError(f"power: the exponent is {type(exponent).__name__}, not a number.")
        return Power(exponent=float(exponent))(self)

    def __abs__(self) -> Any:
        return Abs()(self)

    def __matmul__(self, other: Any) -> Any:
        return Matmul()(self, other)

    def __gt__(self, other: Any) -> Any:
        return self.graph.arithmetic("greater", self, other)

    def __lt__(self, other: Any) -> Any:
        return self.graph.arithmetic("less", self, other)

    def __getitem__(self, key: Any) -> Any:
        return pick(self, key)

    def __iter__(self) -> Any:  # else Python would try self[0], self[1], ... without end
        raise GraphError(f"{self.name} is one tensor, not several: {self.spec}. nn.split gives the parts of one axis.")

    def __bool__(self) -> bool:
        raise GraphError(
            f"{self.name} has no value while the network is traced: {self.spec}. Choose by shapes, or with nn.where."
        )

    def __repr__(self) -> str:
        return f"<{self.name} {self.spec}>"


def pick(x: Tensor, key: Any) -> Any:
    """``x[key]`` for numbers, slices and an ellipsis; a number drops its axis."""
    keys = list(key) if isinstance(key, tuple) else [key]
    shape = x.shape
    if ... in keys:
        at = keys.index(...)
        keys[at : at + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
    keys += [slice(None)] * (len(shape) - len(keys))
    if len(keys) > len(shape):
        raise GraphError(f"{x.name}[...]: {len(keys)} indices for {len(shape)} axes ({x.spec}).")
    cuts: list[slice] = []
    for axis, (k, size) in enumerate(zip(keys, shape, strict=True)):
        if isinstance(k, int):
            if not -size <= k < size:
                raise GraphError(f"{x.name}[...]: index {k} is outside of axis {axis} ({x.spec}).")
            cuts.append(slice(k % size, k % size + 1, 1))
        elif isinstance(k, slice) and (k.step is None or k.step > 0):
            cuts.append(slice(*k.indices(size)))
        else:
            raise GraphError(f"{x.name}[...]: {k!r} is not a number, or a slice with a positive step.")
    whole = [cut == slice(0, size, 1) for cut, size in zip(cuts, shape, strict=True)]
    starts, steps = tuple(cut.start for cut in cuts), tuple(cut.step for cut in cuts)
    stops = tuple(None if all_of_it else cut.stop for cut, all_of_it in zip(cuts, whole, strict=True))
    y = x if all(whole) else Slice(starts=starts, stops=stops, steps=steps)(x)
    single = tuple(axis for axis, k in enumerate(keys) if isinstance(k, int))
    return Sum(axes=single)(y) if single else y


@dataclass(eq=False)
class Graph:
    """Nodes, named outputs, and updates: which value replaces which leaf after a step.

    ``like`` remembers for a cotangent which value it belongs to, so that both are split alike. A training
    step knows its ``network``: the graph that predicts, with loss and metrics as further outputs, and the
    ``gradients`` of the loss by parameter.
    """

    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, Value] = field(default_factory=dict)
    updates: dict[str, Value] = field(default_factory=dict)
    like: dict[Value, Value] = field(default_factory=dict)
    scope: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    network: Graph | None = None
    gradients: dict[str, Value] = field(default_factory=dict)
    where: str | None = None  # of the nodes that are added, if not the line of the caller
    _places: dict[str, int] = field(default_factory=dict, repr=False)

    # building ---------------------------------------------------------------------------------------

    def add(self, op: Op, inputs: Sequence[Tensor] = (), name: str | None = None, at: Block | None = None) -> Any:
        """Append a node; its output, or a tuple of outputs."""
        try:
            specs = op.out_specs(*(x.spec for x in inputs))
        except RapydliError as error:
            raise located(error, inputs) from None
        where = caller() if self.where is None else self.where
        return self._append(Node(name or self.unique(op.name), op, tuple(x.id for x in inputs), specs, at, where))

    def copy(self, graph: Graph, node: Node, inputs: Sequence[Tensor]) -> Any:
        """Append a node of another graph; its specs are worked out again only where an input has another one."""
        if any(graph.spec(v) != x.spec for v, x in zip(node.inputs, inputs, strict=True)):
            return self.add(node.op, inputs, node.name, node.at)
        return self._append(replace(node, inputs=tuple(x.id for x in inputs)))

    def _append(self, node: Node) -> Any:
        self.nodes.append(node)
        made = tuple(Tensor(self, len(self.nodes) - 1, i) for i in range(len(node.specs)))
        return made if len(made) > 1 else made[0]

    def unique(self, kind: str) -> str:
        """A new name in the present scope: 'conv_1', 'conv_2', ..."""
        base = "/".join([*self.scope, kind])
        self.counts[base] = self.counts.get(base, 0) + 1
        return f"{base}_{self.counts[base]}"

    def leaf(self, kind: str, label: str, spec: Spec, init: Op | None = None) -> Tensor:
        """Append an input; its name is the scope and ``label``."""
        label = "/".join([*self.scope, label])
        if label in self:
            raise GraphError(f"two leaves are named {label!r}. Names of parameters and inputs are unique.")
        op = Leaf(kind=kind, label=label, shape=spec.shape, dtype=spec.dtype, init=init)
        made = self.add(op, (), name=label)
        assert isinstance(made, Tensor)
        return made

    def arithmetic(self, kind: str, a: Tensor, b: Any) -> Any:
        """``a`` and a tensor or a number."""
        if isinstance(b, Tensor):
            return registry[kind]()(a, b)
        if not isinstance(b, int | float):
            raise GraphError(f"{kind}: the second operand is {type(b).__name__}, not a tensor or a number.")
        if kind in ("multiply", "divide"):
            return Scale(by=float(b) if kind == "multiply" else 1.0 / b)(a)
        constant = self.add(Fill(value=float(b), shape=(), dtype=a.spec.dtype))
        return registry[kind]()(a, constant)

    # reading ----------------------------------------------------------------------------------------

    def tensor(self, value: Value) -> Tensor:
        return Tensor(self, *value)

    def spec(self, value: Value) -> Spec:
        return self.nodes[value[0]].specs[value[1]]

    def find(self, name: str) -> Tensor:
        """Output 0 of the node of this name, or of the last node of this scope."""
        if name in self:
            return Tensor(self, self._places[name])
        inside = [
            i for i, node in enumerate(self.nodes) if node.name.startswith(f"{name}/") and not isinstance(node.op, Leaf)
        ]
        if not inside:
            near = difflib.get_close_matches(name, [node.name for node in self.nodes], n=3)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise GraphError(f"no node is named {name!r}.{hint}")
        return Tensor(self, inside[-1])

    def __getitem__(self, name: str) -> Node:
        return self.nodes[self.find(name).node]

    def __contains__(self, name: str) -> bool:
        for i in range(len(self._places), len(self.nodes)):  # nodes are only ever appended
            self._places[self.nodes[i].name] = i
        return name in self._places

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def leaves(self, *kinds: str) -> list[Tensor]:
        """The inputs of these kinds (of any, if none is given)."""
        return [
            Tensor(self, i)
            for i, node in enumerate(self.nodes)
            if isinstance(node.op, Leaf) and (not kinds or node.op.kind in kinds)
        ]

    def value_name(self, value: Value) -> str:
        node = self.nodes[value[0]]
        return node.name if len(node.specs) == 1 else f"{node.name}.{node.op.outputs[value[1]]}"

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(x.spec.size for x in self.leaves("param"))

    @property
    def flops(self) -> int:
        """Floating-point operations of one run."""
        ops = (node for node in self.nodes if not isinstance(node.op, Leaf))
        return sum(node.op.flops(*map(self.spec, node.inputs)) for node in ops)

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return html(self)

    def save_svg(self, path: str) -> None:
        """Write a picture of the graph; see `rapydli_flow.graph.draw`."""
        Path(path).write_text(svg(self), encoding="utf-8")
