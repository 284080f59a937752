"""Looking inside: the values of any nodes of a network or training step, and the gradients of its parameters.

Only what leads to the wanted nodes is computed, by the same kernels as in training, but every op by itself:
nothing is fused, so that every node is there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..config import settings
from ..errors import GraphError, SettingError
from ..graph import Graph, Value, predicting
from ..graph.pen import plain
from ..ops import Phase
from ..scheduler import compile_program
from ..spec import Array, Spec
from .devices import device_of
from .evaluate import check_state
from .feeding import fed_arrays
from .predict import only_needed
from .remembered import known
from .stale import rank_on

HEADER = ("node", "value", "min", "mean", "max", "std", "zeros", "not finite")
BINS, BAR_W, BAR_H = 32, 5, 30


def probe(
    graph: Graph,
    nodes: str | Sequence[str],
    feeds: Mapping[str, Any],
    *,
    state: Mapping[str, Array] | None = None,
    seed: int = 0,
    step: int = 0,
    device: str | None = None,
) -> Values:
    """The values of nodes of a network (as it predicts) or of a training step, for one batch.

    ``nodes``: names, or patterns such as ``"conv_*/w"`` and ``"grad/*"``; a scope stands for its last node,
    an output for its value. ``feeds``: arrays for the inputs that are read on the way there. ``state``: by
    default the initial one for ``seed``. ``step`` is the counter that rates and dropout depend on. ``device``: where
    it is computed, by default where RAPYDLI_DEVICE says.
    Raises GraphError for a name that is not there, with the nearest; SettingError, ShapeError or DTypeError for a
    state, feeds or a device that do not fit; MissingDependency for a device that is not there.
    """
    wanted = [nodes] if isinstance(nodes, str) else list(nodes)
    inside = _resolved(graph)
    found: dict[str, Value] = {}
    for name in wanted:
        found |= _find(inside, graph, name)
    return _values(inside, found, feeds, what="probe", state=state, seed=seed, step=step, device=device)


def gradients(
    graph: Graph,
    feeds: Mapping[str, Any],
    *,
    state: Mapping[str, Array] | None = None,
    seed: int = 0,
    step: int = 0,
    device: str | None = None,
) -> Values:
    """The gradient of the loss for every parameter of a training step, for one batch; arguments as of `probe`."""
    if not graph.gradients:
        raise SettingError("gradients: this graph does not know gradients; make a training step with rf.train_step.")
    return _values(graph, graph.gradients, feeds, what="gradients", state=state, seed=seed, step=step, device=device)


def _values(
    graph: Graph,
    found: Mapping[str, Value],
    feeds: Mapping[str, Any],
    *,
    what: str,
    state: Mapping[str, Array] | None,
    seed: int,
    step: int,
    device: str | None,
) -> Values:
    """Run the part of a graph that leads to some values."""
    small = only_needed(Graph(graph.nodes, dict(found)))
    arrays = fed_arrays(what, graph, feeds, {leaf.name for leaf in small.leaves("batch")})
    where = device_of(device, what)
    rank = rank_on(compile_program(small, known(where)), where, threads=settings().threads)
    if state is None:
        rank.start(seed)
    else:
        check_state(small, state)
        rank.load(state)
    rank.feed(arrays)
    rank.step(seed, step)
    values = Values({name: rank.output(name) for name in found})
    rank.close()
    return values


def _resolved(graph: Graph) -> Graph:
    """The graph itself, or a network as it predicts, with all its nodes that do so."""
    if not any(isinstance(node.op, Phase) for node in graph.nodes):
        return graph
    return predicting(graph)


def _find(graph: Graph, traced: Graph, name: str) -> dict[str, Value]:
    """The values that a name or a pattern stands for, by the name that they are shown under."""
    every = {graph.value_name((i, k)): (i, k) for i, node in enumerate(graph.nodes) for k in range(len(node.specs))}
    if any(c in name for c in "*?["):
        matching = {key: value for key, value in every.items() if fnmatchcase(key, name)}
        if not matching:
            near = difflib.get_close_matches(name.strip("*?/"), every, n=3)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise GraphError(f"probe: no node matches {name!r}.{hint}")
        return matching
    if name in every:
        return {name: every[name]}
    if name in graph.outputs and name not in graph:
        return {name: graph.outputs[name]}
    if name in traced and name not in graph:
        raise GraphError(f"probe: {name!r} is not run when the network predicts. Probe its training step.")
    node = graph.find(name).node
    specs = graph.nodes[node].specs
    return {name: (node, 0)} if len(specs) == 1 else {graph.value_name((node, k)): (node, k) for k in range(len(specs))}


@dataclass(frozen=True)
class Numbers:
    """An array in a few numbers, of its finite elements; ``zeros`` is a share of all elements."""

    spec: str
    least: float
    mean: float
    most: float
    std: float
    zeros: float
    not_finite: int

    @classmethod
    def of(cls, array: Array) -> Numbers:
        finite = _finite(array)
        zeros = float((array == 0).mean()) if array.size else 0.0
        spec = str(Spec(array.shape, array.dtype.name))
        if not finite.size:
            return cls(spec, np.nan, np.nan, np.nan, np.nan, zeros, array.size)
        with np.errstate(over="ignore"):
            moments = float(finite.mean()), float(finite.max()), float(finite.std())
        return cls(spec, float(finite.min()), *moments, zeros, array.size - finite.size)

    @property
    def row(self) -> tuple[str, ...]:
        numbers = (self.least, self.mean, self.most, self.std)
        share, count = f"{self.zeros:.1%}" if self.zeros else "", f"{self.not_finite:,}" if self.not_finite else ""
        return (self.spec, *("" if np.isnan(x) else f"{x:.4g}" for x in numbers), share, count)


class Values(Mapping[str, Array]):
    """Arrays by name, which show themselves as a table; in a notebook with a histogram of each."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            near = difflib.get_close_matches(str(name), self._arrays, n=3)
            raise KeyError(f"{name!r} was not asked for; there is {', '.join(near or list(self._arrays)[:5])}.")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def numbers(self) -> dict[str, Numbers]:
        """Range, mean, spread, zeros and elements that are not finite, of each array."""
        return {name: Numbers.of(array) for name, array in self._arrays.items()}

    def histograms(self, bins: int = BINS) -> dict[str, tuple[Array, Array]]:
        """(counts, edges) of the finite elements of each array, in ``bins`` equal bins from the least to the most."""
        if bins < 1:
            raise SettingError(f"histograms: bins={bins} is not 1 or more.")
        return {name: _histogram(array, bins) for name, array in self._arrays.items()}

    def __repr__(self) -> str:
        rows = [HEADER, *((name, *numbers.row) for name, numbers in self.numbers().items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]

        def line(row: Sequence[str]) -> str:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            return "  ".join([*left, *(c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True))]).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in (*HEADER, "histogram"))
        counts = self.histograms()
        body = []
        for name, numbers in self.numbers().items():
            cells = "".join(f"<td>{plain(cell)}</td>" for cell in (name, *numbers.row))
            body.append(f"<tr>{cells}<td>{_bars(counts[name][0])}</td></tr>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _finite(array: Array) -> Array:
    flat = array.reshape(-1).astype(np.float64)
    return flat[np.isfinite(flat)]


def _histogram(array: Array, bins: int) -> tuple[Array, Array]:
    finite = _finite(array)
    lo, hi = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    least = 1e-9 * max(abs(lo), abs(hi)) or 0.5  # of a constant: bins need a width
    if hi - lo < least:
        lo, hi = lo - least, hi + least
    counts, edges = np.histogram(finite, bins, (lo, hi))
    return counts, edges


def _bars(counts: Array) -> str:
    """A histogram as a picture."""
    tallest = max(1, int(counts.max()))
    heights = [BAR_H * int(n) / tallest for n in counts]
    bars = "".join(f"M{i * BAR_W} {BAR_H}v{-h:.1f}h{BAR_W - 1}v{h:.1f}z" for i, h in enumerate(heights) if h)
    size = f'width="{len(counts) * BAR_W}" height="{BAR_H}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><path d="{bars}" fill="#4a83cf"/></svg>'
