"""Layers with weights, and dropout. Data is ``N, *space, C``; sizes are a number or one for each axis."""

from __future__ import annotations

from math import prod
from typing import Any

from ..errors import GraphError
from ..graph import Tensor
from ..ops import Conv, Dropout, Matmul, Phase
from ..random import stream_of
from .initial import Initial
from .layer import Padding, Sizes, constant, layer, pairs, sizes, weights
from .shape import flatten


@layer("conv")
def conv(
    x: Tensor,
    filters: int,
    window: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
    init: Initial | None = None,
) -> Any:
    """Convolution over the 1 to 3 spatial axes of x. Padding is a number or a (low, high) pair for each axis."""
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"conv: x has {space} spatial axes ({x.spec}), not 1 to 3. x is N,*space,C.")
    extents = sizes("conv", "window", window, space)
    channels = x.shape[-1] // max(1, groups)
    shape = (*extents, channels, filters)
    fans = (prod(extents) * channels, prod(extents) * filters // max(1, groups))
    w = weights(x.graph, "w", shape, x.dtype, fans=fans, init=init)
    op = Conv(
        stride=sizes("conv", "stride", stride, space),
        padding=pairs("conv", padding, space),
        dilation=sizes("conv", "dilation", dilation, space),
        groups=groups,
    )
    y = op(x, w)
    return y + constant(x.graph, "param", "b", (filters,), 0.0, x.dtype) if bias else y


@layer("dense")
def dense(x: Tensor, units: int, *, bias: bool = True, init: Initial | None = None) -> Any:
    """y = x w + b on records of one axis (others are flattened)."""
    if len(x.shape) > 2:
        x = flatten(x)
    if len(x.shape) != 2:
        raise GraphError(f"dense: x is {x.spec}, not N,features.")
    w = weights(x.graph, "w", (x.shape[1], units), x.dtype, fans=(x.shape[1], units), init=init)
    y = Matmul()(x, w)
    return y + constant(x.graph, "param", "b", (units,), 0.0, x.dtype) if bias else y


@layer("dropout")
def dropout(x: Tensor, rate: float) -> Any:
    """Drop a share ``rate`` of the elements while training, and scale the others up."""
    graph = x.graph
    op = Dropout(rate=rate, stream=stream_of("/".join(graph.scope)))
    return Phase()(op(x, graph.find("seed"), graph.find("step")), x)
