"""Layers. Data is ``N, *space, C``; sizes of windows, strides and padding are a number or one for each axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

from ..errors import GraphError, SettingError
from ..graph import Graph, Tensor
from ..ops import (
    Conv,
    Dropout,
    Fill,
    Matmul,
    MaxPool,
    Moments,
    Normal,
    Normalize,
    Phase,
    Relu,
    Reshape,
    Softmax,
    Statistics,
    Sum,
    SumPool,
    Tanh,
)
from ..random import stream_of
from ..spec import Spec

Sizes = int | Sequence[int]
Padding = int | Sequence[int | tuple[int, int]]
F = TypeVar("F", bound=Callable[..., Any])


def layer(kind: str) -> Callable[[F], F]:
    """Name what a function adds: 'conv_1/w', 'conv_2/w', ... for ``kind`` 'conv'."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(x, Tensor):
                raise GraphError(f"{kind}: x is {type(x).__name__}, not a tensor. Layers are called inside rf.trace.")
            graph = x.graph
            graph.scope = [*graph.scope, graph.unique(kind).rsplit("/", 1)[-1]]
            try:
                return function(x, *args, **kwargs)
            finally:
                graph.scope = graph.scope[:-1]

        return call  # type: ignore[return-value]

    return wrap


def block(function: F) -> F:
    """A part of a network that is used several times: its parameters are called 'name_1/conv_1/w', ..."""
    return layer(function.__name__)(function)


def weights(graph: Graph, label: str, shape: Sequence[int], fan_in: int, dtype: str, gain: float = 2.0) -> Tensor:
    """Parameters that start normal with variance ``gain / fan_in`` (He et al. 2015 for 2, LeCun 1998 for 1)."""
    name = "/".join([*graph.scope, label])
    init = Normal(std=(gain / fan_in) ** 0.5, stream=stream_of(name), shape=tuple(shape), dtype=dtype)
    return graph.leaf("param", label, Spec(tuple(shape), dtype), init)


def constant(graph: Graph, kind: str, label: str, shape: Sequence[int], value: float, dtype: str) -> Tensor:
    """A leaf ('param' or 'state') that starts with one value everywhere."""
    return graph.leaf(kind, label, Spec(tuple(shape), dtype), Fill(value=value, shape=tuple(shape), dtype=dtype))


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
    gain: float = 2.0,
) -> Any:
    """Convolution over the 1 to 3 spatial axes of x. Padding is a number or a (low, high) pair for each axis."""
    space = len(x.shape) - 2
    if space not in (1, 2, 3):
        raise GraphError(f"conv: x has {space} spatial axes ({x.spec}), not 1 to 3. x is N,*space,C.")
    extents = sizes("conv", "window", window, space)
    channels = x.shape[-1] // max(1, groups)
    shape = (*extents, channels, filters)
    w = weights(x.graph, "w", shape, prod(extents) * channels, x.dtype, gain)
    op = Conv(
        stride=sizes("conv", "stride", stride, space),
        padding=pairs("conv", padding, space),
        dilation=sizes("conv", "dilation", dilation, space),
        groups=groups,
    )
    y = op(x, w)
    return y + constant(x.graph, "param", "b", (filters,), 0.0, x.dtype) if bias else y


@layer("dense")
def dense(x: Tensor, units: int, *, bias: bool = True, gain: float = 2.0) -> Any:
    """y = x w + b on records of one axis (others are flattened)."""
    if len(x.shape) > 2:
        x = flatten(x)
    if len(x.shape) != 2:
        raise GraphError(f"dense: x is {x.spec}, not N,features.")
    w = weights(x.graph, "w", (x.shape[1], units), x.shape[1], x.dtype, gain)
    y = Matmul()(x, w)
    return y + constant(x.graph, "param", "b", (units,), 0.0, x.dtype) if bias else y


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


@layer("dropout")
def dropout(x: Tensor, rate: float) -> Any:
    """Drop a share ``rate`` of the elements while training, and scale the others up."""
    graph = x.graph
    op = Dropout(rate=rate, stream=stream_of("/".join(graph.scope)))
    return Phase()(op(x, graph.find("seed"), graph.find("step")), x)


def max_pool(x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0) -> Any:
    """The maximum of each window; the stride is the window unless given."""
    return MaxPool(**_pooling("max_pool", x, window, stride, padding))(x)[0]


def avg_pool(x: Tensor, window: Sizes, *, stride: Sizes | None = None, padding: Padding = 0) -> Any:
    """The mean of each window; padding does not count."""
    pool = SumPool(**_pooling("avg_pool", x, window, stride, padding))
    ones = x.graph.add(Fill(value=1.0, shape=(1, *x.shape[1:-1], 1), dtype=x.dtype))
    return pool(x) / pool(ones)


def relu(x: Tensor) -> Any:
    """max(x, 0)"""
    return Relu()(x)


def tanh(x: Tensor) -> Any:
    """tanh(x)"""
    return Tanh()(x)


def softmax(x: Tensor) -> Any:
    """exp(x) over its sum, for each record of scores ``N, classes``."""
    return Softmax()(x)


def flatten(x: Tensor) -> Any:
    """``N, ...`` as ``N, features``."""
    return Reshape(shape=(prod(x.shape[1:]),))(x)


def mean(x: Tensor, axes: int | Sequence[int]) -> Any:
    """The mean over axes (negative ones count from the last): a sum times a constant of the global shape."""
    n = len(x.shape)
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    over = Sum(axes=tuple(a + n if -n <= a < 0 else a for a in given))
    return over(x) * (1.0 / prod(x.shape[a] for a in over.axes if 0 <= a < n))


def sizes(layer: str, what: str, value: Sizes, space: int) -> tuple[int, ...]:
    """One number for each spatial axis."""
    out = tuple(value) if isinstance(value, Sequence) else (value,) * space
    if len(out) != space or any(not isinstance(v, int) or v < 1 for v in out):
        raise SettingError(f"{layer}: {what}={value} is not a positive number, or one for each of {space} axes.")
    return out


def pairs(layer: str, value: Padding, space: int) -> tuple[tuple[int, int], ...]:
    """A (low, high) pair for each spatial axis."""
    each = tuple(value) if isinstance(value, Sequence) else (value,) * space
    out = tuple((v[0], v[1]) if isinstance(v, Sequence) and len(v) == 2 else (v, v) for v in each)
    if len(out) != space or any(not isinstance(v, int) or v < 0 for pair in out for v in pair):
        raise SettingError(
            f"{layer}: padding={value} is not 0 or more, or a (low, high) pair for each of {space} axes."
        )
    return out


def _pooling(name: str, x: Tensor, window: Sizes, stride: Sizes | None, padding: Padding) -> dict[str, Any]:
    space = len(x.shape) - 2
    extents = sizes(name, "window", window, space)
    return {
        "window": extents,
        "stride": extents if stride is None else sizes(name, "stride", stride, space),
        "padding": pairs(name, padding, space),
    }
