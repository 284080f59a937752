"""Where a run happens: one interface for ranks in this process, on Dask workers, and as a flow of arrays.

Every order is put in a queue, in order; its `Pending` is asked for the result later, so that a cluster
is never idle while the client looks at numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data import SnapshotWriter, has_snapshot
from ..errors import RunLost
from ..graph import Graph
from ..spec import Array, Block
from .events import SNAPSHOTS
from .segment import SegmentResult
from .timeline import aligned

Pending = Callable[[], Any]
Blocks = Mapping[str, Block]  # of a rank, by leaf


@dataclass(frozen=True)
class Recovery:
    """What a run goes on from: the step, results of segments before it that nobody has heard of yet, and how."""

    step: int
    results: tuple[SegmentResult, ...]
    ranks: int
    seconds: float
    reason: str
    meta: Mapping[str, Any]
    addresses: tuple[str, ...] = ()
    arena_bytes: tuple[int, ...] = ()
    explanation: str = ""
    sent_bytes: tuple[tuple[int, ...], ...] = ()


class Backend(ABC):
    """A training run that can be told what to do next."""

    #: orders that may be in the queue before the oldest one's result is waited for
    depth = 1

    @abstractmethod
    def start(self, state: Mapping[str, Array] | None) -> None:
        """Begin with a state, or with the initial one."""

    @abstractmethod
    def segment(
        self, first: int, steps: int, *, profile: bool, clocks: Mapping[str, float]
    ) -> Callable[[], SegmentResult]:
        """Run training steps; ``clocks``: what clock leaves beside seed and step say in them."""

    @abstractmethod
    def evaluate(self) -> Callable[[], dict[str, float]]:
        """Metrics over the validation set with the parameters of this moment."""

    @abstractmethod
    def snapshot(self, step: int, meta: Mapping[str, Any], *, name: str = SNAPSHOTS) -> Callable[[], object]:
        """Write the state of this moment into the folder ``name`` of run_dir."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Whole parameters and state."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Finish what is being written, and let go of everything."""


class Recovering(Backend):
    """A training run that can go on after a loss of ranks, and with more of them."""

    @abstractmethod
    def recover(self, error: RunLost, pending: Sequence[Pending]) -> Recovery:
        """After a loss: ranks that can go on, and from where. ``pending``: what was ordered and not taken yet.

        The error itself where they cannot.
        """

    @abstractmethod
    def may_grow(self) -> bool:
        """Could the run have more ranks now?"""

    @abstractmethod
    def grow(self, step: int) -> Recovery:
        """Go on with more ranks from this step, up to which everything that was ordered is done."""


class Writers:
    """The snapshot writers of a run, by folder: ``keep`` snapshots in that of the run, one in any other."""

    def __init__(self, run_dir: Path | None, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self._writers: dict[str, SnapshotWriter] = {}

    def write(
        self, name: str, step: int, arrays: Callable[[], Mapping[str, Array]], meta: Mapping[str, Any]
    ) -> Callable[[], object]:
        """Write a snapshot in the background, where its arrays are asked for; what waits for it. One that is there
        already is that of the same run, which went back behind it."""
        writer = self[name]
        if name == SNAPSHOTS and has_snapshot(writer.folder, step):
            return writer.wait
        writer.write_later(step, arrays, meta)
        return writer.wait

    def __getitem__(self, name: str) -> SnapshotWriter:
        """The writer of a folder, made when it is first asked for."""
        assert self.run_dir is not None
        if name not in self._writers:
            self._writers[name] = SnapshotWriter(self.run_dir / name, keep=self.keep, only=name != SNAPSHOTS)
        return self._writers[name]

    def wait(self) -> None:
        """Return when nothing is being written; raises what a write raised."""
        for writer in self._writers.values():
            writer.wait()

    def close(self) -> None:
        """Finish what is being written, and raise the first error of it."""
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.callback(writer.close)


def whole_state(graph: Graph, held: Sequence[Blocks], parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Whole arrays of parameters and state from the blocks of the first ranks, which together hold everything."""
    out: dict[str, Array] = {}
    for leaf in graph.leaves("param", "state"):
        name = leaf.name
        there = [(blocks[name], part[name]) for blocks, part in zip(held, parts, strict=False) if name in blocks]
        whole = next((array for block, array in there if block == Block.all(leaf.spec.shape)), None)
        if whole is None:
            whole = np.empty(leaf.spec.shape, leaf.spec.dtype)
            for block, array in there:
                whole[block.slices] = array
        out[name] = whole
    return out


def holding(graph: Graph, held: Sequence[Blocks]) -> int:
    """How many ranks, from the first on, hold all parameters and state together: one, or all."""
    return 1 if holds_all(graph, held[0]) else len(held)


def holds_all(graph: Graph, blocks: Blocks) -> bool:
    """Are all parameters and state of a graph there?"""
    return all(blocks.get(leaf.name) == Block.all(leaf.spec.shape) for leaf in graph.leaves("param", "state"))


def one_result(results: Sequence[SegmentResult]) -> SegmentResult:
    """What ranks tell as one result: their numbers are the same, or their mean counts where each trains by itself; the
    time is that of the slowest, the time by op the mean."""
    first = results[0]
    if any(result.scalars != first.scalars for result in results):
        every = {k: zip(*(r.scalars[k] for r in results), strict=True) for k in first.scalars}
        means = {k: tuple(sum(values) / len(results) for values in steps) for k, steps in every.items()}
        first = replace(first, scalars=means)
    slowest = max(r.time_s for r in results)
    feed_s = max(r.feed_s for r in results)
    titles = dict.fromkeys(title for r in results for title in r.ops)
    return replace(
        first,
        rank=0,
        time_s=slowest,
        feed_s=feed_s,
        ops={title: sum(r.ops.get(title, 0.0) for r in results) / len(results) for title in titles},
        ranks=tuple(r.shares for r in results),
        timeline=aligned([r.spans for r in results]),
    )
