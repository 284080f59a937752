"""Losses and metrics: functions of the network's output and a label or target that give a mean over the batch.

Losses of scores take labels: ``N,...,classes`` with whole numbers ``N,...``, and give the mean over all
labels. Losses of numbers take targets of the shape of y, and give the mean over all elements. Nothing is
broadcast: shapes that differ are a ShapeError that names both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ShapeError
from ..graph import Tensor
from ..ops import Abs, AtLabel, Correct, CrossEntropy, Hinge, InTop, Power, SigmoidCrossEntropy, SmoothL1
from .shape import mean


def cross_entropy(y: Tensor, label: Tensor, *, smoothing: float = 0.0) -> Any:
    """Mean softmax cross entropy of scores ``N,...,classes`` with whole-number labels ``N,...``.

    ``smoothing`` is the share of each label's probability that goes to all classes alike (Szegedy et al. 2016).
    """
    return _mean(CrossEntropy(smoothing=smoothing)(y, label))


def negative_log_likelihood(y: Tensor, label: Tensor) -> Any:
    """Mean of -y at the label, for log probabilities ``N,...,classes``; see `log_softmax`."""
    return _mean(AtLabel()(y, label)) * -1.0


def hinge(y: Tensor, label: Tensor, *, power: int = 1, one_against_all: bool = False) -> Any:
    """Mean of how far scores ``N,...,classes`` are from a margin of 1, to the power 1 or 2.

    By default each score is held against that of the label: the sum over other classes j of
    max(0, 1 - y[label] + y[j]) ** power / classes, as ``multi_margin_loss`` of PyTorch. ``one_against_all``
    gives the sum over all classes of max(0, 1 - t y[j]) ** power, where t is 1 for the label and -1 for
    others, as ``HingeLoss`` of Caffe.
    """
    return _mean(Hinge(power=power, one_against_all=one_against_all)(y, label))


def mean_squared_error(y: Tensor, target: Tensor) -> Any:
    """Mean of (y - target) ** 2 over all elements."""
    return _mean(Power(exponent=2.0)(_difference("mean_squared_error", y, target)))


def mean_absolute_error(y: Tensor, target: Tensor) -> Any:
    """Mean of |y - target| over all elements."""
    return _mean(Abs()(_difference("mean_absolute_error", y, target)))


def smooth_l1(y: Tensor, target: Tensor, *, beta: float = 1.0) -> Any:
    """Mean over all elements of d ** 2 / (2 beta) where |d| < beta, else |d| - beta / 2, for d = y - target.

    ``beta`` is positive (Girshick 2015; times beta it is the Huber loss).
    """
    return _mean(SmoothL1(beta=beta)(_difference("smooth_l1", y, target)))


def sigmoid_cross_entropy(y: Tensor, target: Tensor) -> Any:
    """Mean over all elements of the cross entropy of sigmoid(y) with probabilities, or 0 and 1.

    y holds logits of any size: nothing overflows. Targets may be whole numbers.
    """
    _same_shape("sigmoid_cross_entropy", y, target)
    return _mean(SigmoidCrossEntropy()(y, target))


def accuracy(y: Tensor, label: Tensor) -> Any:
    """Share of labels at which the largest score is; of equal scores the first counts."""
    return _mean(Correct()(y, label))


def top_k(k: int) -> Callable[[Tensor, Tensor], Any]:
    """A metric: the share of labels that are among the ``k`` largest scores; of equal scores the first count."""

    def in_top_k(y: Tensor, label: Tensor) -> Any:
        return _mean(InTop(k=k)(y, label))

    return in_top_k


def _mean(x: Tensor) -> Any:
    """The mean over all axes."""
    return mean(x, tuple(range(len(x.shape))))


def _same_shape(loss: str, y: Tensor, target: Tensor) -> None:
    if y.shape != target.shape:
        raise ShapeError(
            f"{loss}: y is {y.spec} but target is {target.spec}. The target has the shape of y; reshape one of them."
        )


def _difference(loss: str, y: Tensor, target: Tensor) -> Tensor:
    _same_shape(loss, y, target)
    difference: Tensor = y - target
    return difference
