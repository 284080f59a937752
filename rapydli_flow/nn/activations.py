"""Activations: pointwise functions, and softmax over classes."""

from __future__ import annotations

from typing import Any

from ..graph import Tensor
from ..ops import Relu, Softmax, Tanh


def relu(x: Tensor) -> Any:
    """max(x, 0)"""
    return Relu()(x)


def tanh(x: Tensor) -> Any:
    """tanh(x)"""
    return Tanh()(x)


def softmax(x: Tensor) -> Any:
    """exp(x) over its sum, for each record of scores ``N, classes``."""
    return Softmax()(x)
