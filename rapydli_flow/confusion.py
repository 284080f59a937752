"""Which classes a network takes for which: counts of labels against predicted classes, over a dataset.

Each batch of records is a task that predicts and counts where it runs; only counts come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dask
import numpy as np

from . import markup
from .data import Dataset, check_labels
from .errors import DatasetError, DTypeError, SettingError, ShapeError
from .graph import Graph
from .runtime.predict import predict
from .spec import Array, floating

__all__ = ["ConfusionMatrix", "confusion_matrix"]

MOST_CLASSES = 24  # shown as a square; of more classes the pairs that are confused most
MOST_PAIRS = 20


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """``counts[i, j]``: how many labels of class i were predicted as class j, ``(classes, classes)`` whole numbers.

    Prints as a table, in a notebook with colours. ``names``: what the classes are called; by default their numbers.
    """

    counts: Array
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or self.counts.shape[0] != self.counts.shape[1] or not len(self.counts):
            raise ShapeError(f"ConfusionMatrix: counts have shape {self.counts.shape}, not (classes, classes).")
        if self.counts.dtype.kind not in "iu":
            raise DTypeError(f"ConfusionMatrix: counts are {self.counts.dtype}, not whole numbers.")
        names = tuple(map(str, self.names)) or tuple(map(str, range(len(self.counts))))
        if len(names) != len(self.counts):
            raise SettingError(
                f"ConfusionMatrix: {len(names)} names for {len(self.counts)} classes. Name every class, in their order."
            )
        object.__setattr__(self, "names", names)

    @classmethod
    def of(cls, labels: Array, predicted: Array, classes: int, names: Sequence[str] = ()) -> ConfusionMatrix:
        """Count labels against predicted classes, whole numbers below ``classes`` in arrays of one shape.

        Raises ShapeError for arrays of two shapes, DTypeError and DatasetError for what are no classes.
        """
        labels, predicted = np.asarray(labels), np.asarray(predicted)
        if labels.shape != predicted.shape:
            raise ShapeError(f"ConfusionMatrix: labels have shape {labels.shape}, predictions {predicted.shape}.")
        for name, values in (("labels", labels), ("predicted", predicted)):
            check_labels(values, classes, name)
        return cls(_count(labels, predicted, classes), tuple(names))

    @property
    def total(self) -> int:
        """How many labels there were."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """The share of labels that were predicted."""
        return float(np.trace(self.counts) / self.total) if self.total else float("nan")

    @property
    def recall(self) -> Array:
        """For each class, the share of its labels that were predicted as it; not a number where it has none."""
        return _shares(self.counts.diagonal(), self.counts.sum(1))

    @property
    def precision(self) -> Array:
        """For each class, the share of its predictions that were right; not a number where it was never predicted."""
        return _shares(self.counts.diagonal(), self.counts.sum(0))

    def confused(self, most: int = MOST_PAIRS) -> list[tuple[str, str, int]]:
        """(label, predicted, count) of the wrong predictions, the most frequent first, at most ``most`` pairs."""
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [np.unravel_index(at, wrong.shape) for at in order if wrong.flat[at]]
        return [(self.names[i], self.names[j], int(wrong[i, j])) for i, j in pairs]

    @property
    def words(self) -> str:
        """What the table shows."""
        what = "labels by row, predictions by column" if self._square else "the most frequent mistakes"
        return f"{self.accuracy:.2%} of {self.total:,} labels right; {what}"

    def table(self) -> str:
        """The table as HTML; colours are shares of a row."""
        head, *rows = self._rows()
        if not self._square:
            return markup.table(head, rows, right=1)
        shares = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        colors = {(int(i), int(j) + 1): _tint(shares[i, j], i == j) for i, j in np.argwhere(shares > 0)}
        return markup.table(head, rows, right=len(head) - 1, colors=colors)

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self.words, lines[0].rstrip(), "-" * len(lines[0]), *map(str.rstrip, lines[1:])])

    def _repr_html_(self) -> str:
        return markup.title("Confusion", self.words) + self.table()

    @property
    def _square(self) -> bool:
        return len(self.names) <= MOST_CLASSES

    def _rows(self) -> list[tuple[str, ...]]:
        """A header and the square with recall and precision, or the pairs that are confused most."""
        if not self._square:
            return [("label", "predicted", "count"), *((a, b, f"{n:,}") for a, b, n in self.confused())]
        rows = [("", *self.names, "recall")]
        for name, counts, share in zip(self.names, self.counts, self.recall, strict=True):
            rows.append((name, *(f"{n:,}" if n else "." for n in counts), _percent(share)))
        rows.append(("precision", *map(_percent, self.precision), ""))
        return rows


def confusion_matrix(
    graph: Graph,
    state: Mapping[str, Array],
    data: Dataset | Mapping[str, Array],
    *,
    label: str = "label",
    output: str = "y",
    names: Sequence[str] = (),
) -> ConfusionMatrix:
    """Labels of a dataset, or dict of arrays, against the classes that a network gives the largest score.

    ``graph``: a network (`Run.graph`, `Model.graph`) with scores ``N,...,classes`` as ``output``, one for each
    of the labels ``N,...`` in the field ``label``. ``names``: what the classes are called. Runs on the workers of
    a Dask client, if there is one. Raises ShapeError where scores and labels do not fit, DatasetError for a label
    that is no class or a field that is not there.
    """
    scores = predict(graph, state, data, output=output)
    if scores.ndim < 2 or not floating(scores):
        raise ShapeError(
            f"confusion_matrix: {output!r} is {scores.dtype}{list(scores.shape)}, not scores N,...,classes."
        )
    if isinstance(data, Dataset):
        data.readers_of([label])
        shape = (len(data), *data.specs[label].shape)
    elif isinstance(data, Mapping) and label in data:
        data = {label: np.asarray(data[label])}
        shape = data[label].shape
    else:
        raise DatasetError(f"confusion_matrix: the data has no field {label!r}. Give a dict with it, or label=.")
    if shape != scores.shape[:-1]:
        raise ShapeError(
            f"confusion_matrix: labels {label!r} have shape {shape} where scores have {scores.shape}. "
            "There is one label for every row of scores."
        )
    bounds = np.cumsum([0, *scores.chunks[0]]).tolist()
    parts = scores.to_delayed().reshape(-1)  # a chunk is a batch, whole along all other axes
    counted = dask.delayed(_counted, pure=False)
    tasks = []
    for part, (lo, hi) in zip(parts, pairwise(bounds), strict=True):
        given = data if isinstance(data, Dataset) else data[label][lo:hi]
        tasks.append(counted(part, given, label, lo, hi))
    return ConfusionMatrix(np.sum(dask.compute(*tasks), axis=0), tuple(names))


def _counted(scores: Array, given: Any, label: str, lo: int, hi: int) -> Array:
    """The counts of one batch: where it was predicted."""
    inside = isinstance(given, Dataset)
    labels = given.read(np.arange(lo, hi), [label])[label] if inside else given
    check_labels(labels, scores.shape[-1], label, given.records[lo:hi] if inside else lo)
    return _count(labels, scores.argmax(-1), scores.shape[-1])


def _count(labels: Array, predicted: Array, classes: int) -> Array:
    places = labels.astype(np.int64).reshape(-1) * classes + predicted.reshape(-1)
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)


def _shares(part: Array, whole: Array) -> Array:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{share:.1%}"


def _tint(share: float, right: bool) -> str:
    """A colour for a cell: more of it, the more of the row is there."""
    return f"rgba({'74,131,207' if right else '200,50,79'},{0.12 + 0.6 * float(share):.2f})"
