"""What a rank is fed: its rows of each batch, cut to its blocks, with labels checked."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from ..data import Dataset, Feed, check_labels
from ..errors import DatasetError, DTypeError, SettingError, ShapeError
from ..graph import Graph
from ..ops import Leaf, operand_names
from ..scheduler import Program
from ..spec import Array, Block, Spec


def label_classes(graph: Graph) -> dict[str, int]:
    """Number of classes of each leaf of whole numbers that an op reads as labels of scores.

    Such an op has operands 'x', with one score a class on its last axis, and 'label'. Targets that are not
    classes have no range.
    """
    found: dict[str, int] = {}
    for node in graph.nodes:
        names = operand_names(node.op)
        if not {"x", "label"} <= set(names):
            continue
        i = node.inputs[names.index("label")][0]
        while graph.nodes[i].op.view:
            i = graph.nodes[i].inputs[0][0]
        leaf = graph.nodes[i]
        if isinstance(leaf.op, Leaf) and not leaf.specs[0].floating:
            found[leaf.name] = graph.spec(node.inputs[names.index("x")]).shape[-1]
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
                f"{expected.dtype} without loss. Cast the dataset, or give this dtype to rf.trace, or, for a target, "
                f"to train_step: label={{{leaf.name!r}: rf.Spec({expected.shape}, {record.dtype!r})}}."
            )


def fed_layout(program: Program) -> dict[str, Block]:
    """The blocks of what a rank's program is fed."""
    return {name: program.trained.layout[name] for name in program.trained.kind("batch")}


def fed_rows(layout: Mapping[str, Block]) -> set[tuple[int, int]]:
    """Which rows of a batch a rank reads for its blocks: whole records, from one to before another."""
    return {(block.lo[0], block.hi[0]) for block in layout.values()}


def read_bytes(data: Dataset, layout: Mapping[str, Block]) -> int:
    """Bytes of records that a rank with these blocks reads for a step."""
    record_bytes = sum(reader.record_bytes for reader in data.readers_of(layout).values())
    return record_bytes * sum(hi - lo for lo, hi in fed_rows(layout))


class RankFeed:
    """The part of every batch that one rank holds."""

    def __init__(self, feed: Feed, layout: Mapping[str, Block], classes: Mapping[str, int]) -> None:
        self.feed, self.layout, self.classes = feed, dict(layout), dict(classes)
        self._rows = fed_rows(layout)

    @classmethod
    def of(
        cls,
        data: Dataset,
        layout: Mapping[str, Block],
        classes: Mapping[str, int],
        *,
        seed: int,
        shuffle: bool = True,
        like: Feed | None = None,
    ) -> RankFeed:
        """``layout`` is the rank's block of everything that is fed; ``classes`` are those of its labels; ``like``: a
        feed whose chunks in memory are used."""
        batch = next(iter(layout.values())).whole[0]
        return cls(Feed(data, batch, seed=seed, shuffle=shuffle, fields=list(layout), like=like), layout, classes)

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


class Given:
    """Stands where a feed does, for a rank whose batches are handed to it: ``part`` is its rows of the next one."""

    def __init__(self) -> None:
        self.part: Mapping[str, Array] = {}

    def batch(self, step: int) -> Mapping[str, Array]:
        """What was handed over, whatever the step."""
        return self.part

    def close(self) -> None:
        self.part = {}


def feed_of(
    data: Dataset | None,
    layout: Mapping[str, Block],
    classes: Mapping[str, int],
    *,
    seed: int,
    shuffle: bool,
    like: Feed | None = None,
) -> RankFeed | Given:
    """The feed of a rank. Without data its batches are handed to it, and one that is fed nothing needs no data."""
    if data is None or not layout:
        return Given()
    return RankFeed.of(data, layout, classes, seed=seed, shuffle=shuffle, like=like)


def fed_arrays(what: str, graph: Graph, given: Any, needed: Container[str] | None = None) -> dict[str, Array]:
    """Arrays for the inputs of a graph that are ``needed`` (None: all), in their dtypes; labels are checked.

    ``what`` asks: it begins the message of a SettingError (names), ShapeError, DTypeError or DatasetError (labels).
    """
    specs = {leaf.name: leaf.spec for leaf in graph.leaves("batch")}
    if not isinstance(given, Mapping):
        raise SettingError(f"{what}: a batch is a dict of arrays ({', '.join(specs)}), not {type(given).__name__}.")
    unknown = [str(name) for name in given if name not in specs]
    if unknown:
        raise SettingError(f"{what}: {', '.join(unknown)} is no input of the graph; its inputs are {', '.join(specs)}.")
    out: dict[str, Array] = {}
    classes = label_classes(graph)
    for name, spec in specs.items():
        if needed is not None and name not in needed:
            continue
        if name not in given:
            raise SettingError(f"{what}: {name} ({spec}) is not fed; the batch has {', '.join(given) or 'nothing'}.")
        array = np.asarray(given[name])
        fed = f"{what}: {name} is fed {array.dtype} {array.shape} but the graph takes {spec.dtype} {spec.shape}"
        if array.shape != spec.shape:
            raise ShapeError(f"{fed}. A batch is as large as the network was traced with; trace it again for another.")
        if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise DTypeError(f"{fed}, which it does not become without loss. Cast it first.")
        if name in classes:
            check_labels(array, classes[name], name)
        out[name] = array.astype(spec.dtype, copy=False)
    return out
