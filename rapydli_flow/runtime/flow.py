"""Training as a flow of arrays: every step is a Dask graph of kernel calls ('op') or of stages ('stage').

The state is carried from step to step as futures (or arrays, without a client). Slower than segments,
and all of it can be looked at: each kernel is a task on the dashboard's task stream.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from dask._task_spec import Task, TaskRef
from dask.local import get_sync
from dask.typing import Key
from distributed import Client, Future

from ..data import Dataset
from ..errors import DeviceFault, NonFinite, RunLost
from ..graph import Graph, broken
from ..ops import Leaf
from ..scheduler import Plan
from ..spec import Array, Block, even_bounds, floating
from ..tuner import Tuning
from .backend import Backend, Writers, holding, whole_state
from .bodies import at_hand, pick
from .evaluate import Scorer, mean_scores
from .events import SNAPSHOTS
from .feeding import RankFeed, label_classes
from .lower import Ref, lower
from .participant import CLOCKS
from .segment import KEPT, SegmentResult, fallen, finite
from .workers import everyone

LOOK_S = 5.0  # without a result, until somebody looks whether workers are still there


class Flow(Backend):
    """A plan carried out as Dask graphs of arrays, on a client or in this process."""

    def __init__(
        self,
        step: Graph,
        plan: Plan,
        tunings: Sequence[Tuning],
        data: Dataset,
        validation: Dataset | None,
        *,
        granularity: str,
        client: Client | None,
        workers: Sequence[str] = (),
        seed: int,
        shuffle: bool = True,
        run_dir: Path | None = None,
        keep: int = 3,
    ) -> None:
        self.graph, self.plan, self.graphs, self.tunings = step, plan, plan.rank_graphs(step), plan.tunings(tunings)
        self.data, self.validation = data, validation
        self.granularity, self.client, self.seed, self.shuffle = granularity, client, seed, shuffle
        self.leaves: list[dict[str, Ref]] = [{} for _ in self.graphs]
        self.where = {"workers": list(workers)} if workers else {}
        self.writers = Writers(run_dir, keep)
        self.clocks: Mapping[str, float] = CLOCKS
        self.token = uuid.uuid4().hex
        self.scoring, self.scorings = Scoring(step, validation, self.tunings[0], plan.threads, self.token), 0
        self.inputs = {leaf.name for leaf in step.leaves("batch")}
        self.held = [
            {x.name: graph.nodes[x.node].at or Block.all(x.shape) for x in graph.leaves()} for graph in self.graphs
        ]
        self.readers = []
        for rank, blocks in enumerate(self.held):
            layout = {name: blocks[name] for name in self.inputs if name in blocks}
            dtypes = {x.name: x.dtype for x in step.leaves("batch")}
            self.readers.append(Reader(data, layout, dtypes, label_classes(step), seed, shuffle, (self.token, rank)))

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
            try:
                found = self._step(step)
            except DeviceFault as error:
                raise DeviceFault(f"{error} {KEPT}", sticky=error.sticky, kernel=error.kernel) from error
            for name, value in found.items():
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
        lowered = lower(self.graphs, fed, self.tunings, token=token, granularity=granularity, threads=self.plan.threads)
        tasks.update(lowered.tasks)
        return lowered, tasks

    def _step(self, step: int) -> dict[str, float]:
        lowered, tasks = self._tasks(self.leaves, step, self.granularity)
        outputs = lowered.outputs[0]
        key = f"scalars-{self.token}-{step}"
        tasks[key] = Task(key, read_scalars, *_picked(outputs))
        wanted: list[Key] = list(dict.fromkeys(r.source for u in lowered.updates for r in u.values()))
        values = dict(zip([key, *wanted], self._carried_out(tasks, [key, *wanted]), strict=True))
        numbers = self._result(values[key])
        for leaves, updates in zip(self.leaves, lowered.updates, strict=True):
            leaves.update({name: Ref(values[ref.source], ref.item) for name, ref in updates.items()})
        return dict(zip(outputs, numbers, strict=True))

    def _carried_out(self, tasks: dict[Any, Any], keys: Sequence[Key]) -> Sequence[Any]:
        """What these tasks give, or futures of it."""
        if self.client is None:
            return get_sync(tasks, list(keys))  # type: ignore[no-any-return]
        return self.client.get(tasks, list(keys), sync=False, **self.where)  # type: ignore[no-any-return]

    def _explain(self, before: Sequence[Mapping[str, Ref]], step: int, loss: float) -> None:
        """Run the step again, one op at a time, and raise NonFinite with the first that is not finite."""
        lowered, tasks = self._tasks(before, step, "op")
        made = list(lowered.tasks)
        looks = [("finite", *key) for key in made]
        tasks.update({look: Task(look, all_finite, TaskRef(key)) for look, key in zip(looks, made, strict=True)})
        for (_, rank, node), well in zip(made, map(self._result, self._carried_out(tasks, looks)), strict=True):
            if not well:
                name = self.graphs[rank].nodes[node].name
                where = f"The first output that is not finite is of {name} at step {step}."
                end = fallen(self.graph, f"{where} ", ", or look at its inputs")
                raise NonFinite(f"loss is {loss} at step {step}{end} {KEPT}")
        raise NonFinite(f"loss is {loss} at step {step}, but it was finite when the step was run again.")

    def _value(self, ref: Ref) -> Array:
        return pick(self._result(ref.source), ref.item)

    def _result(self, value: Any) -> Any:
        """What a future is of, or what is there; RunLost where no worker is left that could make it."""
        while isinstance(value, Future):
            try:
                return value.result(timeout=LOOK_S)
            except TimeoutError:
                if value.status == "error":  # it is the task's own
                    raise
                self._look_for_workers()
        return value

    def _look_for_workers(self) -> None:
        """Tasks that only some workers may run wait for ever if these are gone."""
        if self.where and self.client is not None:
            there = everyone(self.client)
            if not any(address in there for address in self.where["workers"]):
                raise RunLost(f"no worker with {self.tunings[0].device.name} is left. Start one, and resume the run.")

    def state(self) -> dict[str, Array]:
        return finite(self._gather())

    def _gather(self) -> dict[str, Array]:
        names = [x.name for x in self.graph.leaves("param", "state")]
        count = holding(self.graph, self.held)
        parts = [{n: self._value(leaves[n]) for n in names if n in leaves} for leaves in self.leaves[:count]]
        return whole_state(self.graph, self.held, parts)

    def evaluate(self) -> Callable[[], dict[str, float]]:
        """One task for the share of each rank."""
        assert self.scoring.validation is not None
        state: Any = self._gather()
        if self.client is not None:
            (state,) = self.client.scatter([state], workers=self.where.get("workers"), hash=False)
        shares = pairwise(even_bounds(len(self.scoring.validation), self.plan.ranks))
        self.scorings += 1
        keys = [(f"evaluate-{self.token}-{self.scorings}", *share) for share in shares]
        tasks = {key: Task(key, score_share, self.scoring, state, *key[1:]) for key in keys}
        metrics = mean_scores([self._result(part) for part in self._carried_out(tasks, keys)])
        return lambda: metrics

    def snapshot(self, step: int, meta: Mapping[str, Any], *, name: str = SNAPSHOTS) -> Callable[[], object]:
        state = self.state()
        return self.writers.write(name, step, lambda: state, meta)

    def close(self, *, failed: bool) -> None:
        self.writers.close()
        self.leaves = []
        forget()
        if self.client is not None and self.scorings:
            with suppress(Exception):  # a cluster that is gone has forgotten, too
                self.client.sync(self.client._run, forget, on_error="ignore", callback_timeout=LOOK_S)


@dataclass(frozen=True)
class Reader:
    """How a process reads the batches of one rank: small to send, made into a feed once."""

    data: Dataset = field(compare=False)
    layout: Mapping[str, Block] = field(compare=False)
    dtypes: Mapping[str, str] = field(compare=False)
    classes: Mapping[str, int] = field(compare=False)
    seed: int = field(compare=False)
    shuffle: bool = field(compare=False)
    key: tuple[str, int]


@dataclass(frozen=True)
class Scoring:
    """How a process scores records of the validation set: made into a scorer once."""

    step: Graph = field(compare=False)
    validation: Dataset | None = field(compare=False)
    tuning: Tuning = field(compare=False)
    threads: int = field(compare=False)
    key: str


@lru_cache(maxsize=1)
def _scorer(scoring: Scoring) -> tuple[Scorer, threading.Lock]:
    tuning = replace(scoring.tuning, device=at_hand(scoring.tuning.device))
    return Scorer(scoring.step, scoring.validation, tuning, threads=scoring.threads), threading.Lock()


def forget() -> None:
    """Let go of the scorer of this process."""
    _scorer.cache_clear()


def score_share(scoring: Scoring, state: Mapping[str, Array], first: int, last: int) -> dict[str, float]:
    """The body of a task: sums over some records of the validation set."""
    scorer, alone = _scorer(scoring)
    with alone:
        return scorer.part(state, first, last)


def all_finite(values: Sequence[Any]) -> bool:
    """The body of a task: has a node given numbers that are all finite?"""
    return all(np.isfinite(v).all() for v in map(np.asarray, values) if floating(v))


@lru_cache(maxsize=16)
def _feed(reader: Reader) -> RankFeed:
    return RankFeed.of(reader.data, reader.layout, reader.classes, seed=reader.seed, shuffle=reader.shuffle)


def load_batch(reader: Reader, step: int) -> dict[str, Array]:
    """The body of a task: one rank's part of a batch, as its kernels take it."""
    batch = _feed(reader).batch(step)
    return {name: array.astype(reader.dtypes[name], casting="same_kind", copy=False) for name, array in batch.items()}


def read_scalars(items: Sequence[Any], *sources: Any) -> tuple[float, ...]:
    """The body of a task: scalar outputs as numbers."""
    return tuple(float(pick(source, item)) for source, item in zip(sources, items, strict=True))


def _picked(refs: Mapping[str, Ref]) -> tuple[Any, ...]:
    return tuple(ref.item for ref in refs.values()), *(TaskRef(ref.source) for ref in refs.values())
