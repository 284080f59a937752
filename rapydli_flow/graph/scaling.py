"""Loss scaling: gradients of a network of float16 are computed of a multiple of the loss, or they would be lost to 0.

    loss -> x scale -> gradients -> / scale -> all finite? -> update, count, grow the scale
                                                    no     -> keep everything, halve the scale

The scale and its counters are state of the training step like any other: it is in snapshots, and the same under every
plan; the scale after a step is an output of it. As PyTorch's GradScaler, which the defaults are of. A loss that is not
finite skips the step as well: a run goes on after it, while the scale is above `LEAST`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite

from ..arguments import is_number, is_whole
from ..errors import GraphError, SettingError
from ..ops import CountOnTurn, Fill, Finite, LossScaleRule, Multiply, OnTurn, Power, Scale, Sum
from ..spec import Spec
from .graph import Graph, Tensor, Value

SCOPE = OUTPUT = "loss_scale"
LEAST, MOST = 1.0, 2.0**24


@dataclass(frozen=True)
class LossScale:
    """A dynamic scale: times ``growth`` after ``every`` updates in a row, times ``backoff`` where the loss or a
    gradient is not finite. It stays within 1 and 2^24; powers of two lose no bits."""

    start: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    every: int = 2000

    def __post_init__(self) -> None:
        numbers = all(map(is_number, (self.start, self.growth, self.backoff))) and is_whole(self.every)
        if not (
            numbers
            and LEAST <= self.start <= MOST
            and self.growth >= 1.0
            and 0.0 < self.backoff < 1.0
            and self.every >= 1
        ):
            raise SettingError(
                f"{self}: start is in [1, 2^24], growth 1 or more, backoff between 0 and 1, every a number of steps."
            )


def fixed(scale: float) -> float:
    """A scale that never changes, if it can be one."""
    if not is_number(scale) or not isfinite(scale) or not scale > 0.0:
        raise SettingError(f"train_step: loss_scale={scale!r} is not a positive, finite number, nor rf.LossScale(...).")
    return float(scale)


class FixedScaling:
    """The loss times a constant; gradients that are not finite are the user's to see."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def loss(self, loss: Tensor) -> Tensor:
        scaled: Tensor = Scale(by=self.scale)(loss)
        return scaled

    def gradients(self, found: Sequence[Tensor]) -> list[Tensor]:
        return [Scale(by=1.0 / self.scale)(g) for g in found]

    def step(self, step: Tensor) -> Tensor:
        return step

    def finish(self, graph: Graph) -> None:
        pass


class DynamicScaling:
    """`LossScale` in the graph of a training step: scale, updates in a row, and all updates, as state."""

    def __init__(self, graph: Graph, rule: LossScale) -> None:
        if OUTPUT in graph.outputs:
            raise GraphError(f"train_step: a metric is called {OUTPUT}, as is the scale of the loss. Rename it.")
        self.rule = rule
        self.scale, self.row, self.count = (
            graph.leaf("state", f"{SCOPE}/{name}", spec, Fill(value=start, shape=(), dtype=spec.dtype))
            for name, start, spec in (
                ("scale", rule.start, Spec(())),
                ("row", 0.0, Spec(())),
                ("updates", 0.0, Spec((), "int64")),
            )
        )

    def loss(self, loss: Tensor) -> Tensor:
        scaled: Tensor = Multiply()(loss, self.scale)
        self.unscaled = loss
        return scaled

    def gradients(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Gradients as they are without a scale."""
        inverse = Power(exponent=-1.0)(self.scale)
        self.found = [Multiply()(g, inverse) for g in found]
        return self.found

    def step(self, step: Tensor) -> Tensor:
        """What an optimizer counts: updates that were made."""
        return self.count

    def finish(self, graph: Graph) -> None:
        """Keep all as it is, running statistics too, where the loss or a gradient that is used is not finite: their sum
        tells, in one pass over each."""
        read = _before(graph, graph.updates.values())
        sums = [Sum(axes=tuple(range(len(g.shape))))(g) for g in self.found if g.node in read]
        finite = Finite()(reduce(lambda a, b: a + b, sums, self.unscaled))
        for name, value in list(graph.updates.items()):
            leaf = graph.find(name)
            _replace(graph, leaf, OnTurn()(graph.tensor(value), leaf, finite))
        rule = self.rule
        after = LossScaleRule(growth=rule.growth, backoff=rule.backoff, every=rule.every, most=MOST)
        scale, row = after(self.scale, self.row, finite)
        _replace(graph, self.scale, scale)
        graph.outputs[OUTPUT] = scale.id
        _replace(graph, self.row, row)
        _replace(graph, self.count, CountOnTurn()(self.count, finite))


def _before(graph: Graph, values: Iterable[Value]) -> set[int]:
    """The nodes that make values, and all that these read."""
    found: set[int] = set()
    todo = list(values)
    while todo:
        i, _ = todo.pop()
        if i not in found:
            found.add(i)
            todo += graph.nodes[i].inputs
    return found


def _replace(graph: Graph, leaf: Tensor, value: Tensor) -> None:
    graph.updates[leaf.name] = value.id
    graph.like[value.id] = leaf.id


def scaling(graph: Graph, precision: str, wanted: float | LossScale | None) -> FixedScaling | DynamicScaling | None:
    """How a training step scales its loss: by itself dynamically for float16, and not at all for others."""
    if wanted is None:
        return DynamicScaling(graph, LossScale()) if precision == "float16" else None
    return DynamicScaling(graph, wanted) if isinstance(wanted, LossScale) else FixedScaling(fixed(wanted))


def finds_scale(step: Graph) -> bool:
    """Does this training step find its loss scale, and skip updates that are not finite?"""
    return any(leaf.name == f"{SCOPE}/scale" for leaf in step.leaves("state"))


def broken(step: Graph, scalars: Mapping[str, Sequence[float]]) -> int | None:
    """The first of some steps whose loss is not finite, if that ends the run: one that was skipped does not, unless
    the scale has fallen as far as it may, when it is not the scale that is to blame."""
    losses = scalars.get("loss", ())
    scales: Sequence[float] = scalars[OUTPUT] if finds_scale(step) else [LEAST] * len(losses)
    found = zip(losses, scales, strict=True)
    return next((i for i, (loss, scale) in enumerate(found) if not isfinite(loss) and scale <= LEAST), None)
