"""Training as a flow of arrays: every step is a Dask graph of kernel calls ('op') or of stages ('stage').

The state is carried from step to step as futures (or arrays, without a client). Slower than segments,
and all of it can be looked at: each kernel is a task on the dashboard's task stream.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from dask._task_spec import Task, TaskRef
from dask.local import get_sync
from distributed import Client

from ..data import Dataset
from ..errors import NonFinite
from ..graph import Graph, broken
from ..ops import Leaf
from ..scheduler import Plan
from ..spec import Array, Block, floating
from ..tuner import Tuning
from .backend import Backend, Writers, holding, whole_state
from .bodies import pick
from .evaluate import Scorer
from .events import SNAPSHOTS
from .feeding import RankFeed, label_classes
from .lower import Ref, lower
from .participant import CLOCKS
from .segment import KEPT, SegmentResult, fallen, finite


class Flow(Backend):
    """A plan carried out as Dask graphs of arrays, on a client or in this process."""

    def __init__(
        self,
        step: Graph,
        plan: Plan,
        tuning: Tuning,
        data: Dataset,
        validation: Dataset | None,
        *,
        granularity: str,
        client: Client | None,
        seed: int,
        shuffle: bool = True,
        run_dir: Path | None = None,
        keep: int = 3,
    ) -> None:
        self.graph, self.plan, self.graphs, self.tuning = step, plan, plan.rank_graphs(step), tuning
        self.data, self.validation = data, validation
        self.granularity, self.client, self.seed, self.shuffle = granularity, client, seed, shuffle
        self.leaves: list[dict[str, Ref]] = [{} for _ in self.graphs]
        self.scorer = Scorer(step, validation, tuning, threads=plan.threads, ranks=plan.ranks)
        self.writers = Writers(run_dir, keep)
        self.clocks: Mapping[str, float] = CLOCKS
        self.token = uuid.uuid4().hex
        self.inputs = {leaf.name for leaf in step.leaves("batch")}
        self.held = [
            {x.name: graph.nodes[x.node].at or Block.all(x.shape) for x in graph.leaves()} for graph in self.graphs
        ]
        self.readers = []
        for rank, blocks in enumerate(self.held):
            layout = {name: blocks[name] for name in self.inputs if name in blocks}
            self.readers.append(Reader(data, layout, label_classes(step), seed, shuffle, (self.token, rank)))

    def start(self, state: Mapping[str, Array] | None) -> None:
        for leaves, graph in zip(self.leaves, self.graphs, strict=True):
            for x in graph.leaves("param", "state"):
                node = graph.nodes[x.node]
                assert isinstance(node.op, Leaf)
                at = node.at or Block.all(x.spec.shape)
                value = node.op.start(self.seed, at) if state is None else state[x.name][at.slices]
                leaves[x.name] = Ref(np.asarray(value, x.spec.dtype))

    def segment(
        self, first: int, steps: int, *, profile: bool, clocks: Mapping[str, float]
    ) -> Callable[[], SegmentResult]:
        self.clocks = {**CLOCKS, **clocks}
        begin = perf_counter()
        scalars: dict[str, list[float]] = {}
        for step in range(first, first + steps):
            before = [dict(leaves) for leaves in self.leaves]
            for name, value in self._step(step).items():
                scalars.setdefault(name, []).append(value)
            if broken(self.graph, {name: values[-1:] for name, values in scalars.items()}) is not None:
                self._explain(before, step, scalars["loss"][-1])
        frozen = {name: tuple(values) for name, values in scalars.items()}
        result = SegmentResult(0, first, steps, frozen, perf_counter() - begin, 0.0)
        return lambda: result

    def _tasks(self, leaves: Sequence[Mapping[str, Ref]], step: int, granularity: str) -> tuple[Any, dict[Any, Any]]:
        """One step lowered, with the tasks that read its batch."""
        token = f"{self.token}-{step}"
        tasks: dict[Any, Any] = {}
        fed: list[dict[str, Ref]] = []
        for rank in range(len(self.graphs)):
            key = (f"load_batch-{token}", rank)
            reader = self.readers[rank]
            if reader.layout:
                tasks[key] = Task(key, load_batch, reader, step)
            values = {**self.clocks, "seed": self.seed, "step": step}
            clock = {x.name: Ref(np.asarray(values[x.name], x.dtype)) for x in self.graph.leaves("clock")}
            fed.append({**leaves[rank], **clock, **{name: Ref(key, name) for name in reader.layout}})
        lowered = lower(self.graphs, fed, self.tuning, token=token, granularity=granularity, threads=self.plan.threads)
        tasks.update(lowered.tasks)
        return lowered, tasks

    def _step(self, step: int) -> dict[str, float]:
        lowered, tasks = self._tasks(self.leaves, step, self.granularity)
        outputs = lowered.outputs[0]
        key = f"scalars-{self.token}-{step}"
        tasks[key] = Task(key, read_scalars, *_picked(outputs))
        wanted: list[Hashable] = list(dict.fromkeys(r.source for u in lowered.updates for r in u.values()))
        if self.client is None:
            values = dict(zip([key, *wanted], get_sync(tasks, [key, *wanted]), strict=True))
            numbers = values[key]
        else:
            futures = self.client.get(tasks, [key, *wanted], sync=False)
            values = dict(zip([key, *wanted], futures, strict=True))
            numbers = values[key].result()
        for leaves, updates in zip(self.leaves, lowered.updates, strict=True):
            leaves.update({name: Ref(values[ref.source], ref.item) for name, ref in updates.items()})
        return dict(zip(outputs, numbers, strict=True))

    def _explain(self, before: Sequence[Mapping[str, Ref]], step: int, loss: float) -> None:
        """Run the step again here, one op at a time, and raise NonFinite with the first that is not finite."""
        here = [{name: Ref(self._value(ref)) for name, ref in leaves.items()} for leaves in before]
        lowered, tasks = self._tasks(here, step, "op")
        names = {key: self.graphs[0].nodes[key[2]].name for key in lowered.tasks}
        keys = list(lowered.tasks)
        for key, values in zip(keys, get_sync(tasks, keys), strict=True):
            if any(floating(v) and not np.isfinite(v).all() for v in values):
                where = f"The first output that is not finite is of {names[key]} at step {step}."
                end = fallen(self.graph, f"{where} ", ", or look at its inputs")
                raise NonFinite(f"loss is {loss} at step {step}{end} {KEPT}")
        raise NonFinite(f"loss is {loss} at step {step}, but it was finite when the step was run again.")

    def _value(self, ref: Ref) -> Array:
        source = ref.source.result() if hasattr(ref.source, "result") else ref.source
        return pick(source, ref.item)

    def state(self) -> dict[str, Array]:
        return finite(self._gather())

    def _gather(self) -> dict[str, Array]:
        names = [x.name for x in self.graph.leaves("param", "state")]
        count = holding(self.graph, self.held)
        parts = [{n: self._value(leaves[n]) for n in names if n in leaves} for leaves in self.leaves[:count]]
        return whole_state(self.graph, self.held, parts)

    def evaluate(self) -> Callable[[], dict[str, float]]:
        metrics = self.scorer(self._gather())
        return lambda: metrics

    def snapshot(self, step: int, meta: Mapping[str, Any], *, name: str = SNAPSHOTS) -> Callable[[], object]:
        state = self.state()
        return self.writers.write(name, step, lambda: state, meta)

    def close(self, *, failed: bool) -> None:
        self.writers.close()
        self.leaves = []


@dataclass(frozen=True)
class Reader:
    """How a process reads the batches of one rank: small to send, made into a feed once."""

    data: Dataset = field(compare=False)
    layout: Mapping[str, Block] = field(compare=False)
    classes: Mapping[str, int] = field(compare=False)
    seed: int = field(compare=False)
    shuffle: bool = field(compare=False)
    key: tuple[str, int]


@lru_cache(maxsize=16)
def _feed(reader: Reader) -> RankFeed:
    return RankFeed.of(reader.data, reader.layout, reader.classes, seed=reader.seed, shuffle=reader.shuffle)


def load_batch(reader: Reader, step: int) -> dict[str, Array]:
    """The body of a task: one rank's part of a batch."""
    return _feed(reader).batch(step)


def read_scalars(items: Sequence[Any], *sources: Any) -> tuple[float, ...]:
    """The body of a task: scalar outputs as numbers."""
    return tuple(float(pick(source, item)) for source, item in zip(sources, items, strict=True))


def _picked(refs: Mapping[str, Ref]) -> tuple[Any, ...]:
    return tuple(ref.item for ref in refs.values()), *(TaskRef(ref.source) for ref in refs.values())
