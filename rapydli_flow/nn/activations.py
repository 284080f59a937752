"""Activations: functions of single elements, and softmax over classes. Shapes and dtypes stay as they are."""

from __future__ import annotations

from typing import Any

from ..graph import Tensor
from ..ops import Elu, Gelu, LeakyRelu, LogSoftmax, Prelu, Relu, Sigmoid, Softmax, Softplus, Swish, Tanh
from .layer import constant, layer


def relu(x: Tensor) -> Any:
    """max(x, 0)"""
    return Relu()(x)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Any:
    """x where x > 0, else slope * x, for a slope of 0 or more (Maas et al. 2013)."""
    return LeakyRelu(slope=slope)(x)


@layer("prelu")
def prelu(x: Tensor, *, shared: bool = False, start: float = 0.25) -> Any:
    """x where x > 0, else slope * x, for a slope that is trained (He et al. 2015).

    The parameter ``slope`` has one value for each channel (the last axis), or one for all if ``shared``.
    """
    slope = constant(x.graph, "param", "slope", () if shared else x.shape[-1:], start, x.dtype)
    return Prelu()(x, slope)


def elu(x: Tensor, alpha: float = 1.0) -> Any:
    """x where x > 0, else alpha (exp(x) - 1), for an alpha of 0 or more (Clevert et al. 2016)."""
    return Elu(alpha=alpha)(x)


def gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """x times the normal distribution's P(X <= x) (Hendrycks, Gimpel 2016).

    ``approximate`` is 'none' for the exact value by erf, or 'tanh' for its approximation.
    """
    return Gelu(approximate=approximate)(x)


def swish(x: Tensor) -> Any:
    """x sigmoid(x) (Ramachandran et al. 2017)."""
    return Swish()(x)


def silu(x: Tensor) -> Any:
    """x sigmoid(x): another name of `swish`."""
    return Swish()(x)


def sigmoid(x: Tensor) -> Any:
    """1 / (1 + exp(-x)), which does not overflow."""
    return Sigmoid()(x)


def softplus(x: Tensor) -> Any:
    """log(1 + exp(x)), which does not overflow."""
    return Softplus()(x)


def tanh(x: Tensor) -> Any:
    """tanh(x)"""
    return Tanh()(x)


def softmax(x: Tensor) -> Any:
    """exp(x) over its sum, for each row of scores: the last axis of ``N,...,classes``."""
    return Softmax()(x)


def log_softmax(x: Tensor) -> Any:
    """The logarithm of `softmax`, exact where that is too small for a number."""
    return LogSoftmax()(x)
