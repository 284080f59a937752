"""Losses and metrics: functions of the network's output and the label that give a mean over the batch."""

from __future__ import annotations

from typing import Any

from ..graph import Tensor
from ..ops import Correct, CrossEntropy
from .shape import mean


def cross_entropy(y: Tensor, label: Tensor) -> Any:
    """Mean softmax cross entropy of scores ``N, classes`` with whole-number labels ``N``."""
    return mean(CrossEntropy()(y, label), (0,))


def accuracy(y: Tensor, label: Tensor) -> Any:
    """Share of records whose largest score is at the label."""
    return mean(Correct()(y, label), (0,))
