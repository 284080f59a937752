"""Normalisation layers."""

from __future__ import annotations

from math import prod
from typing import Any

from ..graph import Tensor
from ..ops import Moments, Normalize, Phase, Statistics
from .layer import constant, layer


@layer("batch_norm")
def batch_norm(x: Tensor, *, momentum: float = 0.9, eps: float = 1e-5) -> Any:
    """Normalise each channel over the whole batch, then scale and shift (Ioffe, Szegedy 2015).

    Running statistics, ``momentum * old + (1 - momentum) * batch``, are used when predicting.
    """
    graph, c, dtype = x.graph, x.shape[-1:], x.dtype
    gain, bias = (constant(graph, "param", n, c, v, dtype) for n, v in (("gain", 1.0), ("bias", 0.0)))
    mean0, var0 = (constant(graph, "state", n, c, v, dtype) for n, v in (("mean", 0.0), ("var", 1.0)))
    count = prod(x.shape[:-1])  # of the whole batch: shapes are global while a network is built
    mean, var, mean1, var1 = Statistics(count=count, momentum=momentum)(*Moments()(x, mean0), mean0, var0)
    graph.updates |= {mean0.name: mean1.id, var0.name: var1.id}
    return Normalize(eps=eps)(x, Phase()(mean, mean0), Phase()(var, var0), gain, bias)
