"""Layers, activations and losses: functions that add ops, and the leaves they train, to a graph.

May import floors 0 to 2 and `graph`. A layer with weights is one function under `@layer`.
"""

from .layers import (
    avg_pool,
    batch_norm,
    block,
    conv,
    dense,
    dropout,
    flatten,
    layer,
    max_pool,
    mean,
    relu,
    softmax,
    tanh,
)
from .losses import accuracy, cross_entropy

__all__ = [
    "accuracy",
    "avg_pool",
    "batch_norm",
    "block",
    "conv",
    "cross_entropy",
    "dense",
    "dropout",
    "flatten",
    "layer",
    "max_pool",
    "mean",
    "relu",
    "softmax",
    "tanh",
]
