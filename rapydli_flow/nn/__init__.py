"""Layers, activations and losses: functions that add ops, and the leaves they train, to a graph.

May import floors 0 to 2 and `graph`. A layer with weights is one function under `@layer`.
"""

from .activations import relu, softmax, tanh
from .initial import he
from .layer import block, layer
from .layers import conv, dense, dropout
from .losses import accuracy, cross_entropy
from .norm import batch_norm
from .pool import avg_pool, max_pool
from .shape import flatten, mean

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
    "he",
    "layer",
    "max_pool",
    "mean",
    "relu",
    "softmax",
    "tanh",
]
