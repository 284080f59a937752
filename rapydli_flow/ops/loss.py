"""Losses and scores of rows of class scores ``N,...,classes`` with whole-number labels ``N,...``.

One value for each label: the classes are those of a record, or of each place of it (segmentation). A
mean over the batch is a sum and a constant of the whole batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import SettingError
from ..spec import Array, Spec
from .base import LETTERS, Op, Reject, Sample, refuse
from .softmax import check_scores, places, softmax

_SAMPLES = (
    (Spec((4, 8)), Spec((4,), "int64")),
    (Spec((2, 3, 5)), Spec((2, 3), "uint8")),
)


def check_labels(op: Op, x: Spec, label: Spec) -> None:
    """Refuse labels that are not one whole number for each row of scores."""
    check_scores(op, x, label=label)
    if label.floating or label.shape != x.shape[:-1]:
        rule = "label has one whole number for each row of x"
        raise refuse(op, rule, {"x": x, "label": label}, "x is N,...,classes; label is N,...")


def _chosen(x: Array, label: Array) -> Array:
    """x[n, label[n]]"""
    return np.take_along_axis(x, np.asarray(label, np.int64)[..., None], -1)[..., 0]


def _onehot(x: Array, label: Array) -> Array:
    return np.asarray(np.arange(x.shape[-1]) == label[..., None], x.dtype)


class Labelled(Op, abstract=True):
    """An op on scores ``N,...,classes`` and labels ``N,...`` that gives one value a label."""

    def infer(self, x: Spec, label: Spec) -> Spec:
        check_labels(self, x, label)
        return Spec(label.shape, x.dtype)

    def index(self, x: Spec, label: Spec) -> str:
        return f"{places(x)} ., {places(x)} -> {places(x)}"

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, label = _SAMPLES[1]
        return (Sample(cls(), (x, label), {1: (0, x.shape[-1])}),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(), (Spec((4, 8)), Spec((4,))), f"{cls.name}: label has one whole number for each row"),
            Reject(cls(), (Spec((4, 8)), Spec((5,), "int64")), f"{cls.name}: label has one whole number for each row"),
            Reject(
                cls(),
                (Spec((4, 8, 2)), Spec((4,), "int64")),
                rf"{cls.name}: label has one whole number .*x f32\[4,8,2\], label i64\[4\].*label is N,",
            ),
            Reject(cls(), (Spec((4,)), Spec((), "int64")), f"{cls.name}: x has class scores on its last axis"),
        )


class LabelledGrad(Op, abstract=True):
    """The gradient of such an op: rows like those of the scores."""

    def infer(self, dy: Spec, x: Spec, label: Spec) -> Spec:
        check_labels(self, x, label)
        if dy.shape != label.shape:
            raise refuse(self, "dy has one value a label", {"dy": dy, "label": label}, "dy and label are N,...")
        return x

    def index(self, dy: Spec, x: Spec, label: Spec) -> str:
        return f"{places(x)}, {places(x)} ., {places(x)} -> {places(x)} ."

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, label = _SAMPLES[1]
        return (Sample(cls(), (Spec(label.shape), x, label), {2: (0, x.shape[-1])}),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        x, label = _SAMPLES[0]
        return (Reject(cls(), (Spec((5,)), x, label), f"{cls.name}: dy has one value a label"),)


class CrossEntropy(Labelled):
    """y[n] = log(sum of exp x[n]) - x[n, label[n]]: softmax and cross entropy with whole-number labels.

    ``smoothing`` s gives the label a probability of 1 - s, and shares s among all classes (Szegedy et al.
    2016): the score of the label becomes (1 - s) x[n, label[n]] + s mean of x[n].
    """

    smoothing: float = 0.0

    def infer(self, x: Spec, label: Spec) -> Spec:
        if not 0.0 <= self.smoothing < 1.0:
            raise SettingError(f"cross_entropy: smoothing={self.smoothing} is not in [0, 1).")
        return super().infer(x, label)

    def reference(self, x: Array, label: Array) -> Array:
        z = x - x.max(-1, keepdims=True)
        score = _chosen(z, label)
        if self.smoothing:
            score = score * (1.0 - self.smoothing) + z.mean(-1) * self.smoothing
        return np.asarray(np.log(np.exp(z).sum(-1)) - score, x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return CrossEntropyGrad(smoothing=self.smoothing)(dy, *inputs), None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, label = _SAMPLES[0]
        return (*super().samples(), Sample(cls(smoothing=0.2), (x, label)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (*super().rejects(), Reject(cls(smoothing=1.0), _SAMPLES[0], r"smoothing=1.0 is not in \[0, 1\)"))


class CrossEntropyGrad(LabelledGrad):
    """dx[n] = dy[n] (softmax(x[n]) - (1 - smoothing) onehot(label[n]) - smoothing / classes)"""

    smoothing: float = 0.0

    def reference(self, dy: Array, x: Array, label: Array) -> Array:
        s = self.smoothing
        p = softmax(x) - _onehot(x, label) * (1.0 - s) - s / x.shape[-1]
        return np.asarray(p * dy[..., None], x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, label = _SAMPLES[0]
        return (*super().samples(), Sample(cls(smoothing=0.2), (Spec(label.shape), x, label)))


class Hinge(Labelled):
    """How far scores are from a margin of 1, to the first or second ``power``.

    y[n] = sum over j other than the label of max(0, 1 - x[n, label] + x[n, j]) ** power / classes, as
    Crammer and Singer (2001); or, ``one_against_all``, the sum over all j of max(0, 1 - t x[n, j]) **
    power with t = 1 for the label and -1 for the others.
    """

    power: int = 1
    one_against_all: bool = False

    def infer(self, x: Spec, label: Spec) -> Spec:
        if self.power not in (1, 2):
            raise SettingError(f"hinge: power={self.power} is not 1 or 2.")
        return super().infer(x, label)

    def reference(self, x: Array, label: Array) -> Array:
        margins, _ = _margins(x, label, self.one_against_all)
        total = (margins**self.power).sum(-1)
        return np.asarray(total if self.one_against_all else total / x.shape[-1], x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        return HingeGrad(power=self.power, one_against_all=self.one_against_all)(dy, *inputs), None

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, label = _SAMPLES[0]
        return (*super().samples(), Sample(cls(power=2, one_against_all=True), (x, label)))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (*super().rejects(), Reject(cls(power=3), _SAMPLES[0], "hinge: power=3 is not 1 or 2"))


def _margins(x: Array, label: Array, one_against_all: bool) -> tuple[Array, Array]:
    """max(0, margin) of each class, and the sign of its own score in it."""
    onehot = _onehot(x, label)
    if one_against_all:
        sign = 1.0 - 2.0 * onehot
        return np.maximum(0.0, 1.0 + sign * x), sign
    return np.maximum(0.0, 1.0 - _chosen(x, label)[..., None] + x) * (1.0 - onehot), 1.0 - onehot


class HingeGrad(LabelledGrad):
    """The gradient of `Hinge`; 0 at a margin that is just kept."""

    power: int = 1
    one_against_all: bool = False

    def reference(self, dy: Array, x: Array, label: Array) -> Array:
        margins, sign = _margins(x, label, self.one_against_all)
        slope = np.where(margins > 0.0, 1.0 if self.power == 1 else 2.0 * margins, 0.0) * sign
        if not self.one_against_all:
            slope = (slope - _onehot(x, label) * slope.sum(-1, keepdims=True)) / x.shape[-1]
        return np.asarray(slope * dy[..., None], x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        x, label = _SAMPLES[0]
        return (*super().samples(), Sample(cls(power=2, one_against_all=True), (Spec(label.shape), x, label)))


class AtLabel(Labelled):
    """y[n] = x[n, label[n]]"""

    def reference(self, x: Array, label: Array) -> Array:
        return np.asarray(_chosen(x, label), x.dtype)

    def vjp(self, dy: Any, y: Any, *inputs: Any) -> tuple[Any, ...]:
        x, label = inputs
        return AtLabelGrad(classes=x.shape[-1])(dy, label), None


class AtLabelGrad(Op):
    """dx[n, j] = dy[n] where j is label[n], else 0, for j = 0 to ``classes`` - 1"""

    classes: int

    def infer(self, dy: Spec, label: Spec) -> Spec:
        if label.floating or label.shape != dy.shape:
            rule = "label has one whole number for each value of dy"
            raise refuse(self, rule, {"dy": dy, "label": label}, "dy and label are N,...")
        return Spec((*dy.shape, self.classes), dy.dtype)

    def index(self, dy: Spec, label: Spec) -> str:
        letters = " ".join(LETTERS[: len(dy.shape)])
        return f"{letters}, {letters} -> {letters} ."

    def reference(self, dy: Array, label: Array) -> Array:
        return np.asarray((np.arange(self.classes) == label[..., None]) * dy[..., None], dy.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return (Sample(cls(classes=5), (Spec((2, 3)), Spec((2, 3), "uint8")), {1: (0, 5)}),)

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (Reject(cls(classes=5), (Spec((4,)), Spec((4,))), "at_label_grad: label has one whole number"),)


class Correct(Labelled):
    """y[n] = 1 where the first largest score of x[n] is at label[n], else 0."""

    def reference(self, x: Array, label: Array) -> Array:
        return np.asarray(x.argmax(-1) == label, x.dtype)


class InTop(Labelled):
    """y[n] = 1 where label[n] is among the ``k`` largest scores of x[n], else 0; of equal scores the first come first.

    NaN counts as the largest score, as it does for `Correct`, which is this for k = 1.
    """

    k: int

    def infer(self, x: Spec, label: Spec) -> Spec:
        out = super().infer(x, label)
        if not 1 <= self.k <= x.shape[-1]:
            rule = f"k={self.k} is not 1 to the number of classes, {x.shape[-1]}"
            raise refuse(self, rule, {"x": x, "label": label}, "Count fewer of the largest scores.")
        return out

    def reference(self, x: Array, label: Array) -> Array:
        largest = np.lexsort((-x, ~np.isnan(x)), axis=-1)[..., : self.k]  # stable, NaN first
        return np.asarray((largest == label[..., None]).any(-1), x.dtype)

    @classmethod
    def samples(cls) -> tuple[Sample, ...]:
        return tuple(Sample(cls(k=k), ins, {1: (0, ins[0].shape[-1])}) for k, ins in zip((3, 1), _SAMPLES, strict=True))

    @classmethod
    def rejects(cls) -> tuple[Reject, ...]:
        return (
            Reject(cls(k=0), _SAMPLES[0], "in_top: k=0 is not 1 to the number of classes, 8"),
            Reject(cls(k=9), _SAMPLES[0], "in_top: k=9 is not 1 to the number of classes, 8"),
            Reject(cls(k=1), (Spec((4, 8)), Spec((4,))), "in_top: label has one whole number for each row"),
        )
