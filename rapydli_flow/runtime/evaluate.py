"""Running a network that predicts: over arrays, and over a dataset to get its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ..data import Dataset, check_labels
from ..errors import DTypeError, SettingError
from ..graph import Graph, predicting, with_batch
from ..ops import Leaf
from ..scheduler import Plan, Program, compile_program
from ..spec import Array, Block, even_bounds
from ..tuner import Tuning
from .feeding import label_classes
from .grouped import kernels_of
from .participant import Participant
from .stale import rank_on
from .warm import warm


class Predictor:
    """A network with its state, for batches of any size up to the one it was traced with.

    Programs are made for the batch sizes that come: the whole batch and the remainder. They read the state where it is:
    its arrays must stay as they are until another state is loaded.
    """

    def __init__(self, network: Graph, state: Mapping[str, Array], tuning: Tuning, *, threads: int = 1) -> None:
        self.network, self.tuning, self.threads = predicting(network), tuning, threads
        self.inputs = tuple(leaf.name for leaf in self.network.leaves("batch"))
        self.batch_size = self.network.leaves("batch")[0].spec.shape[0]
        self._state = dict(state)
        self._ranks: dict[int, Participant] = {}

    def load(self, state: Mapping[str, Array]) -> None:
        """Predict with another state from now on."""
        self._state = dict(state)
        for rank in self._ranks.values():
            rank.load(self._state)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for one batch."""
        size = len(feeds[self.inputs[0]])
        rank = self._rank(size)
        rank.feed({name: feeds[name] for name in self.inputs})
        rank.step(0, 0)
        return {name: rank.output(name) for name in rank.program.outputs}

    def program(self, size: int) -> Program:
        """The program for a batch of ``size`` records."""
        if size < 1:
            raise SettingError("predict: there are no records.")
        graph = self.network if size == self.batch_size else with_batch(self.network, size)
        (graph,) = Plan(1, self.threads).rank_graphs(graph)
        remainder = size != self.batch_size  # is whatever is left: nobody tunes for it
        tuning = replace(self.tuning, strict=False) if remainder else self.tuning
        return compile_program(graph, tuning, lent=[leaf.name for leaf in graph.leaves("param", "state")])

    def _rank(self, size: int) -> Participant:
        if size not in self._ranks:
            program = self.program(size)
            warm(kernels_of(program), program.device)
            rank = rank_on(program, program.device, threads=self.threads)
            rank.load(self._state)
            self._ranks[size] = rank
        return self._ranks[size]


def check_state(graph: Graph, state: Mapping[str, Array]) -> None:
    """Raise SettingError unless the state has every parameter and state of the graph, in its shape."""
    for leaf in graph.leaves("param", "state"):
        if leaf.name not in state:
            raise SettingError(f"the state has no {leaf.name!r}; it has {', '.join(sorted(state)) or 'nothing'}.")
        if np.shape(state[leaf.name]) != leaf.spec.shape:
            given = np.shape(state[leaf.name])
            raise SettingError(f"state {leaf.name!r} has shape {given} but the network expects {leaf.spec.shape}.")


def complete_state(step: Graph, arrays: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """The state of a training step to begin with: what is given, and optimizer state that is not from its first value.

    Raises SettingError for names that the training step does not have, for missing parameters and for other
    shapes; DTypeError for values that cannot be cast.
    """
    assert step.network is not None
    leaves = step.leaves("param", "state")
    unknown = sorted(set(map(str, arrays)) - {leaf.name for leaf in leaves})
    if unknown:
        raise SettingError(f"the training step has no {', '.join(unknown[:5])}. Is the state another network's?")
    check_state(step.network, arrays)
    out: dict[str, Array] = {}
    for leaf in leaves:
        op = step.nodes[leaf.node].op
        assert isinstance(op, Leaf)
        given = arrays.get(leaf.name)
        out[leaf.name] = op.start(seed, Block.all(leaf.shape)) if given is None else np.asarray(given)
        if not np.can_cast(out[leaf.name].dtype, leaf.dtype, "same_kind"):
            raise DTypeError(f"state {leaf.name!r} is {out[leaf.name].dtype}, not {leaf.dtype}. Cast it first.")
    check_state(step, out)
    return out


def batches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Intervals of at most ``size`` that cover [first, last), as equal as they can be: few sizes need few kernels."""
    count = -(-(last - first) // size)
    bounds = even_bounds(last - first, count) if count else ()
    for lo, hi in pairwise(bounds):
        yield first + lo, first + hi


def score(predictor: Predictor, data: Dataset, first: int, last: int) -> dict[str, float]:
    """Sums over records [first, last) of what each scalar output is the mean of, and the 'records'.

    A mean is a sum times a constant of the traced batch size, so on a smaller batch it is still that
    sum over the same number.
    """
    classes = label_classes(predictor.network)
    total: dict[str, float] = {"records": float(last - first)}
    for lo, hi in batches(first, last, predictor.batch_size):
        feeds = data.read(np.arange(lo, hi), predictor.inputs)
        for name, count in classes.items():
            check_labels(feeds[name], count, name, data.records[lo:hi])
        for name, value in predictor(feeds).items():
            if value.shape == ():
                total[name] = total.get(name, 0.0) + float(value) * predictor.batch_size
    return total


def mean_scores(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means over all records from the sums of parts, in the order of the parts; the last ones may be empty."""
    names = [name for name in parts[0] if name != "records"]
    records = sum(part["records"] for part in parts)
    return {name: sum(part.get(name, 0.0) for part in parts) / records for name in names}


def scored(graph: Graph) -> Graph:
    """The network of a training step without its prediction as output: only scalars are computed."""
    network = graph.network
    if network is None:
        raise SettingError("this graph does not know its network; make it with rf.train_step.")
    out = Graph(network.nodes, {k: v for k, v in network.outputs.items() if network.spec(v).shape == ()})
    return predicting(out)


class Scorer:
    """Metrics of a training step's network over a validation set, in this process, for one state after the other.

    Records are taken in the shares that ``ranks`` would take on a cluster: the sums have the same bits there.
    """

    def __init__(
        self, step: Graph, validation: Dataset | None, tuning: Tuning, *, threads: int, ranks: int = 1
    ) -> None:
        self.step, self.validation, self.tuning, self.threads = step, validation, tuning, threads
        self.ranks = ranks
        self._predictor: Predictor | None = None

    def __call__(self, state: Mapping[str, Array]) -> dict[str, float]:
        assert self.validation is not None
        return mean_scores(
            [self.part(state, *share) for share in pairwise(even_bounds(len(self.validation), self.ranks))]
        )

    def part(self, state: Mapping[str, Array], first: int, last: int) -> dict[str, float]:
        """The sums over a part of the validation set; see `score`."""
        assert self.validation is not None
        if self._predictor is None:
            self._predictor = Predictor(scored(self.step), state, self.tuning, threads=self.threads)
        self._predictor.load(state)
        return score(self._predictor, self.validation, first, last)
