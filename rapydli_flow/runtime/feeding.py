"""What a rank is fed: its rows of each batch, cut to its blocks, with labels checked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..data import Dataset, Feed, check_labels
from ..errors import DatasetError
from ..graph import Graph
from ..ops import Correct, CrossEntropy, Leaf
from ..scheduler import Program
from ..spec import Array, Block, Spec


def label_classes(graph: Graph) -> dict[str, int]:
    """Number of classes of each leaf that is read as labels."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node.op, CrossEntropy | Correct):
            leaf = graph.nodes[node.inputs[1][0]]
            if isinstance(leaf.op, Leaf):
                found[leaf.name] = graph.spec(node.inputs[0]).shape[1]
    return found


def check_fields(graph: Graph, data: Dataset) -> None:
    """Raise DatasetError unless the dataset has a field of the right shape for everything that is fed."""
    specs = data.specs
    for leaf in graph.leaves("batch"):
        if leaf.name not in specs:
            raise DatasetError(
                f"{data.address}: there is no field {leaf.name!r}; the network is fed {leaf.name!r} but the dataset "
                f"has {', '.join(specs) or 'none'}. Rename the field, or the parameter of the network."
            )
        record, expected = specs[leaf.name], leaf.spec
        if record.shape != expected.shape[1:]:
            raise DatasetError(
                f"{data.address}: records of {leaf.name!r} are {record} but the network takes "
                f"{Spec(expected.shape[1:], expected.dtype)}. Shapes are *space,C without the batch."
            )
        if not np.can_cast(record.dtype, expected.dtype, "same_kind"):
            raise DatasetError(
                f"{data.address}: records of {leaf.name!r} are {record.dtype}, which does not become "
                f"{expected.dtype} without loss. Cast the dataset, or trace the network with this dtype."
            )


def fed_layout(program: Program) -> dict[str, Block]:
    """The blocks of what a rank's program is fed."""
    return {name: program.layout[name] for name in program.kind("batch")}


class RankFeed:
    """The part of every batch that one rank holds."""

    def __init__(self, feed: Feed, layout: Mapping[str, Block], classes: Mapping[str, int]) -> None:
        self.feed, self.layout, self.classes = feed, dict(layout), dict(classes)
        self._rows = {(block.lo[0], block.hi[0]) for block in self.layout.values()}

    @classmethod
    def of(
        cls,
        data: Dataset,
        layout: Mapping[str, Block],
        classes: Mapping[str, int],
        *,
        seed: int,
        shuffle: bool = True,
    ) -> RankFeed:
        """``layout`` is the rank's block of everything that is fed; ``classes`` are those of its labels."""
        batch = next(iter(layout.values())).whole[0]
        return cls(Feed(data, batch, seed=seed, shuffle=shuffle, fields=list(layout)), layout, classes)

    def batch(self, step: int) -> dict[str, Array]:
        """This rank's arrays for a step; DatasetError where a label is out of range."""
        parts = {rows: self.feed.batch(step, *rows) for rows in self._rows}
        out = {}
        for name, block in self.layout.items():
            array = parts[block.lo[0], block.hi[0]][name]
            if name in self.classes:
                rows = self.feed.rows(step)[block.lo[0] : block.hi[0]]
                subset = self.feed.dataset.subset
                check_labels(array, self.classes[name], name, rows if subset is None else subset[rows])
            out[name] = array[(slice(None), *block.slices[1:])]
        return out

    def close(self) -> None:
        self.feed.close()
