"""Random networks under random plans, each against one worker: ``python -m rapydli_flow.testing.plan_matrix``.

    1  3.1e-15  4 ranks  f64[6,8,9,4] conv 3x3/2+1:1 - dense
                         conv_1: samples in 2, height in 2; dense_1: filters in 4
    2  refused  2 ranks  f64[4,7,5,4] conv 2x4/1+0:1 - dense
                         plan: conv_1/conv_1: 3 cannot be divided into 4 parts

The number is the largest relative deviation of losses and state after some training steps in float64. It ends with 1 if
one is over 1e-10. A plan may be refused with a clear error; that is told, and no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import nn, optim
from ..errors import SettingError, ShapeError
from ..graph import Graph, trace, train_step
from ..scheduler import Plan, Split, make_plan
from ..spec import Spec
from .plans import batches, deviation, programs, train

LIMIT = 1e-10
CLASSES = 5
Layer = tuple[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Case:
    """One network under one plan, and how far it was off; ``refused``: what the planner said instead."""

    network: str
    plan: str
    ranks: int
    deviation: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        number = "refused" if self.refused else f"{self.deviation:7.1e}"
        return f"{number}  {self.ranks} ranks  {self.network}\n{' ' * 25}{self.refused or self.plan}"


def cases(seed: int, count: int, *, steps: int = 6) -> Iterator[Case]:
    """Draw cases and run them."""
    rng = np.random.default_rng(seed)
    while count:
        drawn = _network(rng)
        if drawn is None:
            continue
        title, graph = drawn
        count -= 1
        yield _case(rng, title, graph, steps)


def _case(rng: np.random.Generator, title: str, graph: Graph, steps: int) -> Case:
    ranks = int(rng.integers(2, 5)) if rng.integers(8) else 1
    try:
        words, plan = _plan(rng, graph, ranks)
        made = programs(graph, plan)
    except (ShapeError, SettingError) as error:
        return Case(title, "", ranks, refused=str(error))
    fed = batches(graph, 3, CLASSES)
    one = train(programs(graph, Plan()), fed, steps)
    return Case(title, words, ranks, deviation(train(made, fed, steps), one))


# networks ----------------------------------------------------------------------------------------------


def _network(rng: np.random.Generator) -> tuple[str, Graph] | None:
    """A training step of a random network, or None if its layers do not fit together."""
    layers = _layers(rng)
    spec = Spec((int(rng.integers(4, 9)), int(rng.integers(6, 13)), int(rng.integers(5, 11)), 4), "float64")

    def network(x: Any) -> Any:
        for _, layer in layers:
            x = layer(x)
        return nn.dense(x, CLASSES)

    optimizer = (optim.sgd(0.05, momentum=0.9), optim.adam(0.01, eps=1e-2))[int(rng.integers(2))]
    try:
        graph = trace(network, spec)
        step = train_step(graph, loss=nn.cross_entropy, optimizer=optimizer, metrics={"accuracy": nn.accuracy})
    except ShapeError:
        return None
    return f"{spec} {' - '.join(words for words, _ in layers)} - dense", step


def _layers(rng: np.random.Generator) -> list[Layer]:
    kinds: Sequence[Callable[[np.random.Generator], Layer]] = (
        _conv,
        _conv,
        _conv,
        _pool,
        _batch_norm,
        _dropout,
        _residual,
        _branches,
        _activation,
    )
    return [kinds[int(rng.integers(len(kinds)))](rng) for _ in range(int(rng.integers(2, 6)))]


def _conv(rng: np.random.Generator) -> Layer:
    window, stride = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    padding, dilation = int(rng.integers(0, 3)), int(rng.integers(1, 3))
    filters = int(rng.integers(2, 7))
    how: dict[str, Any] = {"stride": stride, "padding": (padding, (padding, 1)), "dilation": dilation}
    words = f"conv {filters}x{window}/{stride}+{padding}:{dilation}"
    return words, lambda x: nn.relu(nn.conv(x, filters, window, **how))


def _pool(rng: np.random.Generator) -> Layer:
    window, stride = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    kind = (nn.max_pool, nn.avg_pool)[int(rng.integers(2))]
    return f"{kind.__name__} {window}/{stride}", lambda x: kind(x, window, stride=stride)


def _batch_norm(rng: np.random.Generator) -> Layer:
    if rng.integers(2):
        return "batch_norm", lambda x: nn.batch_norm(x)
    return "batch_norm by 1", lambda x: nn.batch_norm(x, group=1) if x.shape[1] > 2 else x


def _dropout(rng: np.random.Generator) -> Layer:
    return "dropout", lambda x: nn.dropout(x, 0.3)


def _residual(rng: np.random.Generator) -> Layer:
    return "residual", lambda x: nn.relu(x + nn.conv(x, x.shape[-1], 3, padding=1))


def _branches(rng: np.random.Generator) -> Layer:
    filters = int(rng.integers(2, 5))
    words = f"branches {filters}"
    return words, lambda x: nn.concatenate([nn.conv(x, filters, 1), nn.tanh(nn.conv(x, 3, 3, padding=1))])


def _activation(rng: np.random.Generator) -> Layer:
    kind = (nn.tanh, nn.relu, nn.sigmoid)[int(rng.integers(3))]
    return kind.__name__, lambda x: kind(x)


# plans -------------------------------------------------------------------------------------------------


def _plan(rng: np.random.Generator, graph: Graph, ranks: int) -> tuple[str, Plan]:
    """A strategy, or splits of layers drawn one by one."""
    kind = ("data", "spatial", "filters", "channels", "hybrid", "pipeline", "mixed", "mixed")[int(rng.integers(8))]
    if kind == "mixed":
        splits = _splits(rng, graph, ranks)
        data = "data" if rng.integers(2) else None
        words = "; ".join(f"{name}: {split}" for name, split in splits.items())
        return f"{data or 'splits'}; {words}", make_plan(graph, ranks, strategy=data, splits=splits)
    options: dict[str, Any] = {}
    if kind == "spatial" and ranks == 4 and rng.integers(2):
        options["grid"] = (2, 2)
    if kind == "pipeline":
        options["micro_batches"] = int(rng.integers(1, 4))
    if kind in ("data", "spatial") and rng.integers(2):
        options["shard"] = ("state", "parameters")[int(rng.integers(2))]
    words = ", ".join([kind, *(f"{name}={value}" for name, value in options.items())])
    return words, make_plan(graph, ranks, strategy=kind, **options)


def _splits(rng: np.random.Generator, graph: Graph, ranks: int) -> dict[str, Split]:
    """Splits of some layers with weights along one axis or two, on all ranks or some."""
    layers = list(dict.fromkeys(x.name.rpartition("/")[0] for x in graph.leaves("param")))
    found: dict[str, Split] = {}
    for layer in layers:
        if "batch_norm" in layer or not rng.integers(3):
            continue
        some = tuple(sorted(int(r) for r in rng.permutation(ranks)[: int(rng.integers(1, ranks + 1))]))
        axes = ("samples", "height", "width", "channels", "filters") if "conv" in layer else ("samples", "filters")
        first, second = (axes[int(i)] for i in rng.permutation(len(axes))[:2])
        parts: dict[str, Any] = {first: len(some)}
        if len(some) == 4 and rng.integers(2):
            parts = {first: 2, second: 2}
        found[layer] = Split(**parts, ranks=some)
    return found or {layers[-1]: Split(filters=ranks)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cases; 1 if one deviates."""
    parser = argparse.ArgumentParser(prog="python -m rapydli_flow.testing.plan_matrix", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args(arguments)
    worst, refused = 0.0, 0
    for n, case in enumerate(cases(options.seed, options.cases, steps=options.steps), 1):
        print(f"{n:4}  {case}", flush=True)
        worst, refused = max(worst, case.deviation), refused + bool(case.refused)
    print(f"{options.cases} cases, {refused} refused; the largest deviation is {worst:.1e} (limit {LIMIT:.0e})")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
