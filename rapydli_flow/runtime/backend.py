"""Where a run happens: one interface for ranks in this process, on Dask workers, and as a flow of arrays.

Every order is put in a queue, in order; its `Pending` is asked for the result later, so that a cluster
is never idle while the client looks at numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..graph import Graph
from ..scheduler.split import Layout
from ..spec import Array
from .segment import SegmentResult

Pending = Callable[[], Any]


class Backend(ABC):
    """A training run that can be told what to do next."""

    #: orders that may be in the queue before the oldest one's result is waited for
    depth = 1

    @abstractmethod
    def start(self, state: Mapping[str, Array] | None) -> None:
        """Begin with a state, or with the initial one."""

    @abstractmethod
    def segment(self, first: int, steps: int, *, profile: bool) -> Callable[[], SegmentResult]:
        """Run training steps."""

    @abstractmethod
    def evaluate(self) -> Callable[[], dict[str, float]]:
        """Metrics over the validation set with the parameters of this moment."""

    @abstractmethod
    def snapshot(self, step: int, meta: Mapping[str, Any]) -> Callable[[], object]:
        """Write the state of this moment."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Whole parameters and state."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Finish what is being written, and let go of everything."""


def whole_state(graph: Graph, layouts: Mapping[str, Layout], parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Whole arrays of parameters and state from the blocks of all ranks."""
    out: dict[str, Array] = {}
    for leaf in graph.leaves("param", "state"):
        name = leaf.name
        if name not in layouts:
            out[name] = parts[0][name]
            continue
        array = np.empty(leaf.spec.shape, leaf.spec.dtype)
        for block, part in zip(layouts[name], parts, strict=True):
            array[block.slices] = part[name]
        out[name] = array
    return out


def divided(graph: Graph, layouts: Mapping[str, Layout]) -> bool:
    """Is a parameter or state held in parts?"""
    return any(leaf.name in layouts for leaf in graph.leaves("param", "state"))


def same_scalars(results: Sequence[SegmentResult]) -> SegmentResult:
    """The result of rank 0; its time is that of the slowest rank."""
    first = results[0]
    slowest = max(r.time_s for r in results)
    feed_s = max(r.feed_s for r in results)
    return SegmentResult(0, first.first, first.steps, first.scalars, slowest, feed_s, first.ops)
